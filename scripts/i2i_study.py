"""Forgetting in a model that fills holes of digits, its surrogates and its rivals.

    python scripts/compose_digit_pictures.py --output runs/digit_pictures --train 1200
    sa-diffusers train-base --config configs/digits_inpaint_base.yaml --data_dir ylecun/mnist \\
        --exclude_classes 2 5 8 --output_dir runs/digits_inpaint_retrained
    python scripts/i2i_study.py --pictures runs/digit_pictures --retrained runs/digits_inpaint_retrained/pipeline \\
        --seeds 0 1 2

That is of the bundled masked autoencoder. By --model it is one of tokens or of pixels, as train-base makes them by
configs/digits_token_inpaint_base.yaml and configs/digits_pixel_inpaint_base.yaml, with a --retrained and an
--output_dir of its own.

Leaves study.json with every number, study.md with tables, and three figures. Seed by seed; to resume, run the same
command again: what study.json holds is not run again. Half an hour of one core for the second command, an hour for the
third.
"""

from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from studies.i2i.table import I2IConfig, run_study, table


def main() -> None:
    config = parse_config(I2IConfig, description=__doc__)
    with friendly_errors():
        print(table(run_study(config)))
        print(f"saved {Path(config.output_dir) / 'study.json'}")


if __name__ == "__main__":
    main()
