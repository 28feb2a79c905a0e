"""Try to bring a forgotten concept back through the prompt; see --help."""

from sa_diffusers.cli.attack import main


if __name__ == "__main__":
    main()
