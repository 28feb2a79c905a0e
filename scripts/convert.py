"""Import files of the authors' Stable Diffusion code; nothing that a file names is imported or run; see --help."""

from sa_diffusers.cli.convert import main


if __name__ == "__main__":
    main()
