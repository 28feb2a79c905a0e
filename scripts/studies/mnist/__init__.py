"""The MNIST study of Selective Amnesia: each part a module with `run(study)`, which returns the part's numbers."""
