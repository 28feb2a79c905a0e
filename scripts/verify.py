"""Check that a run's folder, a saved pipeline or one on the hub is what was written there; see --help."""

from sa_diffusers.cli.verify import main


if __name__ == "__main__":
    main()
