"""Commands, one a file; each has `main(argv)`, whose None is the arguments of this process."""

import os


# transformers would begin every command with notices about torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
