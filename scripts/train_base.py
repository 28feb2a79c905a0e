"""Train a base model, to forget concepts of afterwards; see --help."""

from sa_diffusers.cli.train_base import main


if __name__ == "__main__":
    main()
