"""Part 1 of the study: the paper's MNIST results."""

from collections.abc import Mapping
from pathlib import Path

from studies.mnist.paper.bars import differences, judges, runs_table, runs_text
from studies.mnist.paper.comparisons import compare_ablations, compare_digits, compare_with_study
from studies.mnist.paper.figures import classifier_points
from studies.mnist.paper.runs import Run, ablation_runs, default_run, faithful_run, fast_run
from studies.mnist.sections import figure, merge_named, section, table
from studies.mnist.spread import CONCEPT, FLOORS, RETAINED, Values, cells, pick, readings, spread
from studies.mnist.study import Study


PAPER_ROWS = [  # Heng & Soh (2023), section 4; the entropy is the one that the README of their code prints
    ["paper, original", 0.967, "–", "–", "–", "–", "–", "–"],
    ["paper, after (λ 100)", 0.058, 2.19, "–", "–", 10000, "–", "–"],
]


def compute(study: Study, folder: Path) -> dict:
    """Trains, on first use, what the paper trains: forgets 0 in every way, and every digit by default."""
    fast, faithful = fast_run(study), faithful_run(study)
    digits = {digit: default_run(study, digit) for digit in range(len(study.load(study.base()).labels))}
    sections = {
        "forget_0": _forget_zero(study, fast, faithful, folder),
        "ablations": compare_ablations(study, [fast, faithful, *ablation_runs(study)], folder),
        "ten_digits": compare_digits(study, digits, folder),
        "digit_1": compare_with_study(study, digits),
    }
    return {"title": "The paper's MNIST results"} | merge_named(sections)


def _forget_zero(study: Study, fast: Run, faithful: Run, folder: Path) -> dict:
    """Forget 0 with noise: the original and both runs beside the paper, and what nothing at all is read as."""
    runs = (fast, faithful)
    original = readings(study, fast.metrics, "before")
    every = {"original": original} | {run.title: readings(study, run.metrics, "after") for run in runs}
    judged = judges(study)
    found = {run.title: differences(0, judged.of(original), judged.of(every[run.title])) for run in runs}
    rows = [["original", *cells(original, CONCEPT + RETAINED), "–", "–", "–"]]
    for run in runs:
        seconds = run.metrics["seconds"]
        values = cells(every[run.title], CONCEPT + RETAINED)
        rows.append([run.title, *values, run.steps, seconds["train"], seconds["total"]])
    floors = [[title, *cells(original, keys), *["–"] * 5] for title, keys in FLOORS.items()]
    columns = ["model", "P(0)", "entropy (nats)", "retained P", "worst retained P", "steps", "training s", "run s"]
    title = "Forget 0 with noise: mean ± standard deviation over the classifiers"
    tables = [table(title, columns, rows + PAPER_ROWS + floors), runs_table(0, found), _classifier_table(every)]
    text = [*_classifier_text(original), *runs_text(0, found, judged), _cost_text(study, fast, faithful)]
    caption = (
        "What each classifier reads where the 0 is asked for. After forgetting, the points should lie on the lines of "
        "flat grey."
    )
    figures = [figure(classifier_points(every), folder / "paper_classifiers.png", caption)]
    numbers = {"readings": every, "bars": found, "seconds": {run.title: run.metrics["seconds"] for run in runs}}
    return section(text, tables, figures, numbers)


def _classifier_table(every: Mapping[str, Values]) -> dict:
    """Each classifier's own rows: of every model, and of pictures with nothing in them."""
    rows = []
    for name, some in next(iter(every.values())).items():
        own = {title: values[name] for title, values in every.items()}
        read = [(title, [values[key] for key in CONCEPT + RETAINED]) for title, values in own.items()]
        read += [(title, [some[key] for key in keys] + ["–", "–"]) for title, keys in FLOORS.items()]
        accuracy = "–" if some["classifier_accuracy"] is None else some["classifier_accuracy"]
        rows += [[name, accuracy, title, *values] for title, values in read]
    columns = ["classifier", "its accuracy", "reads", "P(0)", "entropy (nats)", "retained P", "worst retained P"]
    return table("Forget 0 with noise, every classifier", columns, rows)


def _classifier_text(original: Values) -> list[str]:
    grey = [spread(pick(original, key)) for key in FLOORS["flat grey"]]
    return [
        f"Classifiers that read the pictures: {len(original)}; their accuracy on real test images: "
        f"{spread(pick(original, 'classifier_accuracy'))}. A decoder that is taught uniform noise by cross-entropy "
        "learns its mean, flat grey. So P and entropy of a forgotten digit measure how a classifier reads grey: "
        f"P(0) of flat grey is {grey[0]}, its entropy {grey[1]} nats.",
        "The paper reports P(0) .967 before and .058 after, with an entropy of almost 2.30 nats (at most 2.3026); the "
        "README of its code prints .0581 and 2.1946. Both are of one classifier.",
    ]


def _cost_text(study: Study, fast: Run, faithful: Run) -> str:
    """The optimiser's steps of both: the seconds depend on what else ran on the machine."""
    sizes = [f"{run.settings.train_batch_size:,}" for run in (fast, faithful)]
    batches = f"of {sizes[0]} in both" if sizes[0] == sizes[1] else f"of {sizes[0]} and {sizes[1]}"
    fisher = [f"{run.settings.fisher_samples:,}" for run in (fast, faithful)]
    return (
        f"The fast default trains for {fast.described}; the faithful run for {faithful.described}. That is "
        f"{fast.steps / faithful.steps:.1%} of the optimiser's steps; their batches are {batches} (pictures of the "
        f"surrogate, and as many replayed), their Fisher is of {fisher[0]} and {fisher[1]} samples. The seconds in "
        f"the table ({study.config.num_threads} CPU thread(s)) depend on what else ran on the machine, so runs are "
        "not compared by them."
    )
