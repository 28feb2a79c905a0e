"""Measure images: text-to-image pipelines side by side, a run of this package, or two folders; see --help."""

from sa_diffusers.cli.evaluate import main


if __name__ == "__main__":
    main()
