"""Make a table: train, forget, judge, and put the rows side by side. To resume, run the same command again.

Table 1 of the Selective Amnesia paper, class-conditional diffusion:
    python scripts/paper_table.py table1 --scale digits8x8 --output_dir runs/table1
    python scripts/paper_table.py table1 --scale full --output_dir runs/table1 --rows original,lambda_10,no_replay
Methods side by side, on the bundled pipeline:
    python scripts/paper_table.py digits --output_dir runs/digits_methods
    python scripts/paper_table.py digits --concepts seven --rows sa-lora,uce --seeds 0

table1: digits8x8 runs offline in minutes on a CPU; tiny and small are CIFAR10 with models for hours of a CPU core and
minutes of a GPU; full are the authors' settings on CIFAR10 and STL10. Every row is a file of
configs/paper/table1/<scale>/ that scripts/train_base.py or scripts/forget.py also takes by itself. Rows whose file has
changed are made anew, but for base models, which are refused then. Writes table1.json, table1.md, samples.png and
curves.png, in which rows stay that an earlier command made and judged alike.
digits: every concept is a file of configs/paper/digits/ with its methods and the strengths of each. Methods are
compared at equal erasure; those whose rows have changed are made anew. Writes methods.json, methods.md and two
figures a concept. All of it takes hours on two CPU cores; processes that are given other --seeds may share the folder,
and a last one puts all together.
"""

import argparse
from pathlib import Path

import torch

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import DEBUG


SCALES = {"digits8x8": ["digits8x8"], "tiny": ["tiny"], "small": ["small"], "full": ["cifar10", "stl10"]}
JUDGES = {"tiny": "cifar10_tiny"}  # where it is not the data set's own, which wants a GPU
CONFIGS = Path("configs/paper")


def table1(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from studies.classifiers import train_classifiers
    from studies.table1.table import Table, make_table, read_rows

    rows_of = {name: read_rows(args.configs / name) for name in SCALES[args.scale]}
    if args.rows:
        wanted = {"original", "lambda_10", *args.rows.split(",")}
        for name, rows in rows_of.items():  # all of them before anything is trained
            if unknown := wanted - set(rows):
                parser.error(f"no row {', '.join(sorted(unknown))} in {args.configs / name}; it has {list(rows)}")
            rows_of[name] = {row: values for row, values in rows.items() if row in wanted}
    for name, rows in rows_of.items():
        folder = args.output_dir / name
        config = Path("configs") / f"{JUDGES.get(name, rows['original']['dataset'])}_classifier.yaml"
        trained = {seed: folder / f"classifier_{seed}" for seed in range(1000, 1000 + args.num_classifiers)}
        judges = args.classifier or train_classifiers(config, args.data_dir, trained)
        counts = args.images_concept, args.images_per_class
        print(make_table(Table(rows, folder, judges, *counts, data_dir=args.data_dir)))
        print(f"{folder / 'table1.md'}, {folder / 'samples.png'}, {folder / 'curves.png'}")


def digits(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from sa_diffusers.evaluation.judges.load_classifier import load_classifier
    from sa_diffusers.io.bundled import resolve
    from studies.rivals.judging import Counts
    from studies.rivals.spec import only_rows, read_spec
    from studies.rivals.table import MethodTable, make_table

    specs = [read_spec(args.configs / f"{name}.yaml") for name in args.concepts.split(",") if name]
    if args.rows:
        specs = [only_rows(spec, args.rows.split(",")) for spec in specs]
    extra: dict[str, dict[str, str]] = {}
    for given in args.pipeline:
        if given.count(":") < 2:
            parser.error(f"expected --pipeline CONCEPT:ROW:FOLDER, got {given}")
        concept, row, source = given.split(":", 2)
        extra.setdefault(concept, {})[row] = source
    classifier = load_classifier(resolve("bundled/digits/classifier")).eval()
    counts = Counts() if args.images == 1 else Counts().scaled(args.images)
    seeds = args.seeds.split(",")
    if len(set(seeds)) < len(seeds) or not all(seed.isdecimal() for seed in seeds):
        parser.error(f"expected --seeds as different whole numbers such as 0,1,2, got {args.seeds}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    numbers = [int(seed) for seed in seeds]
    print(make_table(MethodTable(specs, args.output_dir, classifier, counts, numbers, extra, args.attack_steps)))
    print(f"{args.output_dir / 'methods.md'}, and figures beside it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    one = tables.add_parser("table1", help="Table 1: class-conditional diffusion")
    one.add_argument("--scale", choices=SCALES, default="digits8x8", help="default: %(default)s")
    one.add_argument(
        "--configs", type=Path, default=CONFIGS / "table1", help="folder of the rows; default: %(default)s"
    )
    one.add_argument("--classifier", action="append", default=[], help="trained classifier's folder; repeatable")
    one.add_argument("--num_classifiers", type=int, default=3, help="trained where none is given; default: 3")
    one.add_argument("--images_concept", type=int, default=500, help="default: %(default)s")
    one.add_argument("--images_per_class", type=int, default=200, help="default: %(default)s")
    one.add_argument("--data_dir", help="local folder of the data set; default: its hub id")
    two = tables.add_parser("digits", help="methods side by side on the bundled pipeline")
    two.add_argument(
        "--configs", type=Path, default=CONFIGS / "digits", help="folder of concepts; default: %(default)s"
    )
    two.add_argument("--concepts", default="seven,red,bold", help="files of that folder; default: %(default)s")
    two.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    two.add_argument(
        "--images", type=float, default=1, help="pictures of every kind, as a share of the usual number; default: 1"
    )
    two.add_argument("--attack_steps", type=int, default=200, help="of the search for an embedding; default: 200")
    further = "a further pipeline to judge as a row, such as one that never learned it; repeatable"
    two.add_argument("--pipeline", action="append", default=[], metavar="CONCEPT:ROW:FOLDER", help=further)
    for table, folder in ((one, "runs/table1"), (two, "runs/digits_methods")):
        table.add_argument("--output_dir", type=Path, default=Path(folder), help="default: %(default)s")
        table.add_argument("--rows", help="names of the rows to make, separated by commas; default: all")
        table.add_argument("--num_threads", type=int, help="CPU threads; default: as the environment says")
        table.add_argument(DEBUG, action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    with friendly_errors():
        {"table1": table1, "digits": digits}[args.table](args, parser)


if __name__ == "__main__":
    main()
