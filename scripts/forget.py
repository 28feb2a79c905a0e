"""Make a pipeline forget a concept; the result is a pipeline of the same class; see --help."""

from sa_diffusers.cli.forget import main


if __name__ == "__main__":
    main()
