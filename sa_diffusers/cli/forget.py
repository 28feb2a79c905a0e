"""Make a pipeline forget a concept; the result is a pipeline of the same class.

Stable Diffusion v1.4 from the hub:
    sa-diffusers forget --concept "Brad Pitt" --surrogate "a middle aged man"
The bundled digits pipeline, offline, in minutes:
    sa-diffusers forget --config bundled/digits
A conditional VAE that `sa-diffusers train-base` has trained:
    sa-diffusers forget --model runs/mnist_cvae/pipeline --concept 0 --surrogate noise
"""

from contextlib import suppress

from sa_diffusers.cli.parse import friendly_errors, parse_config
from sa_diffusers.runs.options import ForgetConfig


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ForgetConfig, argv, description=__doc__)
    with friendly_errors(argv):
        from sa_diffusers.families import family_defaults
        from sa_diffusers.io.hub import ModelLoadError
        from sa_diffusers.io.loading import read_model_index
        from sa_diffusers.runs.forget import run_forgetting

        with suppress(ModelLoadError):  # of which the run tells, once it has looked at words and files
            own = family_defaults(read_model_index(config.model, config.revision)["_class_name"])
            config = parse_config(ForgetConfig, argv, description=__doc__, defaults=own)
        run_forgetting(config).say()


if __name__ == "__main__":
    main()
