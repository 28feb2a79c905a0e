"""Push what a finished run left to the hub, each part with its card, to a repository of its own; see --help."""

from sa_diffusers.cli.push import main


if __name__ == "__main__":
    main()
