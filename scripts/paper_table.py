"""Make a table of the Selective Amnesia paper: train, forget, judge, and put the rows side by side.

    python scripts/paper_table.py table1 --scale digits8x8 --output_dir runs/table1
    python scripts/paper_table.py table1 --scale full --output_dir runs/table1 --rows original,lambda_10,no_replay

digits8x8 runs offline in minutes on a CPU; small is CIFAR10 with a model for one GPU; full are the authors' settings
on CIFAR10 and STL10. Every row is a file of configs/paper/table1/<scale>/ that scripts/train_base.py or
scripts/forget.py takes by itself, too. To resume, run the same command again; rows whose file has
changed are made anew, but for base models, which are refused then. Writes table1.json, table1.md,
samples.png and curves.png.
"""

import argparse
from pathlib import Path

import torch

from sa_diffusers.cli import config_from_dict, friendly_errors


SCALES = {"digits8x8": ["digits8x8"], "small": ["small"], "full": ["cifar10", "stl10"]}
CONFIGS = Path("configs/paper/table1")


def train_judges(classifier_config: Path, count: int, data_dir: str | None, folder: Path) -> list[str]:
    """Train classifiers; those that are there are kept."""
    import yaml

    from sa_diffusers.classifier_training import ClassifierConfig, train_and_save_classifier

    values = yaml.safe_load(classifier_config.read_text())
    folders = []
    for seed in range(1000, 1000 + count):
        own = folder / f"classifier_{seed}"
        if not (own / "classifier").exists():
            options = values | {"output_dir": str(own), "seed": seed, "data_dir": data_dir}
            train_and_save_classifier(config_from_dict(ClassifierConfig, options))
        folders.append(str(own / "classifier"))
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["table1"])
    parser.add_argument("--scale", choices=SCALES, default="digits8x8", help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/table1"), help="default: %(default)s")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the rows; default: %(default)s")
    parser.add_argument("--rows", help="names of the rows to make, separated by commas; default: all")
    parser.add_argument("--classifier", action="append", default=[], help="trained classifier's folder; repeatable")
    parser.add_argument("--num_classifiers", type=int, default=3, help="trained where none is given; default: 3")
    parser.add_argument("--images_concept", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--images_per_class", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--data_dir", help="local folder of the data set; default: its hub id")
    parser.add_argument("--num_threads", type=int, help="CPU threads; default: as the environment says")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    with friendly_errors():
        from sa_diffusers.table1 import Table, make_table, read_rows

        rows_of = {name: read_rows(args.configs / name) for name in SCALES[args.scale]}
        if args.rows:
            wanted = {"original", "lambda_10", *args.rows.split(",")}
            for name, rows in rows_of.items():  # all of them before anything is trained
                if unknown := wanted - set(rows):
                    parser.error(f"no row {', '.join(sorted(unknown))} in {args.configs / name}; it has {list(rows)}")
                rows_of[name] = {row: values for row, values in rows.items() if row in wanted}
        for name, rows in rows_of.items():
            folder = args.output_dir / name
            config = Path("configs") / f"{rows['original']['dataset']}_classifier.yaml"
            judges = args.classifier or train_judges(config, args.num_classifiers, args.data_dir, folder)
            counts = args.images_concept, args.images_per_class
            print(make_table(Table(rows, folder, judges, *counts, data_dir=args.data_dir)))
            print(f"{folder / 'table1.md'}, {folder / 'samples.png'}, {folder / 'curves.png'}")


if __name__ == "__main__":
    main()
