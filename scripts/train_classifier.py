"""Train the classifier that judges generated images; see --help."""

from sa_diffusers.cli.train_classifier import main


if __name__ == "__main__":
    main()
