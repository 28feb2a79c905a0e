"""The small world of the bundled pipeline: MNIST digits with an ink, a background and a stroke, and captions."""
