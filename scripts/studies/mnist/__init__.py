"""The MNIST study of Selective Amnesia: each part has `compute(study, folder)`, which returns what it found."""
