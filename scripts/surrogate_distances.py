"""Which surrogate costs least: candidates ordered by how much they would change; see --help."""

from sa_diffusers.cli.surrogates import main


if __name__ == "__main__":
    main()
