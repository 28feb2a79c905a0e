"""Make a pipeline forget a concept; the result is a pipeline of the same class.

Stable Diffusion v1.4 from the hub:
    sa-diffusers forget --concept "Brad Pitt" --surrogate "a middle aged man"
The bundled digits pipeline, offline, in minutes:
    sa-diffusers forget --config bundled/digits
A conditional VAE that `sa-diffusers train-base` has trained:
    sa-diffusers forget --model runs/mnist_cvae/pipeline --concept 0 --surrogate noise
"""

from contextlib import suppress

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import Given, parse_given
from sa_diffusers.runs.options import ForgetConfig, RunOptions


def main(argv: list[str] | None = None) -> None:
    given = parse_given(ForgetConfig, argv, description=__doc__)
    with friendly_errors(argv):
        config = over_its_family(given)
        from sa_diffusers.runs.forget import run_forgetting

        run_forgetting(config).say()


def over_its_family(given: Given[RunOptions]) -> RunOptions:
    """What is given over the options of the model's kind; exits with code 2 where that cannot work."""
    from sa_diffusers.families import family_defaults
    from sa_diffusers.io.hub import ModelLoadError
    from sa_diffusers.io.loading import read_model_index

    own = {}
    with suppress(ModelLoadError):  # of which the run tells, once it has looked at words and files
        own = family_defaults(read_model_index(given.get("model"), given.get("revision"))["_class_name"])
    return given.config(own)


if __name__ == "__main__":
    main()
