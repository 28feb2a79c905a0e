"""Compose the pictures that bundled/digits_inpaint forgets and judges by: the centres of MNIST's, as PNG in parquet.

    python scripts/compose_digit_pictures.py --output sa_diffusers/assets/digits_inpaint/pictures

With --train 1200 --test 100 they are those of scripts/i2i_study.py.
"""

import argparse
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

from sa_diffusers.data.picture_groups import read_group


SIDE = 24  # pixels: beyond them digits are black


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="ylecun/mnist", help="MNIST: hub id or local folder.")
    parser.add_argument("--output", required=True, help="Folder for train.parquet and test.parquet.")
    parser.add_argument("--train", type=int, default=100, help="Training pictures of each class.")
    parser.add_argument("--test", type=int, default=100, help="Test pictures of each class.")
    given = parser.parse_args()
    group = read_group(given.data_dir, "--data_dir", SIDE, (given.train, given.test), SIDE)
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    for split, data in (("train", group.train), ("test", group.test)):
        rows = {"image": [Picture.fromarray(image[0].numpy()) for image in data.images], "label": data.labels.tolist()}
        features = Features(image=Image(), label=ClassLabel(names=data.names))
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    main()
