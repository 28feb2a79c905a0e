"""How well it stays forgotten: two recipes and the original under several searches, beside what they break."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.io.atomic_files import write_json, write_text
from sa_diffusers.report.tables import markdown_table
from studies.rivals.attacking import Attack, draw_targets
from studies.rivals.judging import Counts, Judge
from studies.rivals.runs import Point, original_point, run_row
from studies.rivals.spec import ConceptSpec


ROWS = ("sa-edit", "sa-robust")
# Options of `Attack`; the last is beyond what training used, and is made of seed 0 alone.
SEARCHES = {
    **{f"one vector, search {number}": {"search": number} for number in range(3)},
    "four vectors": {"num_tokens": 4},
    "two words": {"num_tokens": 2, "typed": True},
}
LONG = {f"four vectors, 1,000 steps, search {n}": {"num_tokens": 4, "steps": 1000, "search": n} for n in range(3)}


@dataclass
class RobustStudy:
    """What to make: of every concept and seed each row and search, kept in the folder as soon as it is there."""

    specs: list[ConceptSpec]
    folder: Path
    classifier: ImageClassifier
    counts: Counts
    seeds: Sequence[int]


def make_study(study: RobustStudy) -> str:
    """Run, judge and attack whatever is not done; writes robust.json and robust.md, and returns the latter."""
    results, texts = {}, []
    for spec in study.specs:
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in study.seeds:
            for name, numbers in _measure(study, spec, seed).items():
                rows.setdefault(name, []).append(numbers)
        results[spec.name] = rows
        texts.append(f"**{spec.options['concept']} → {spec.options['surrogate']}**\n\n{table(rows)}")
        write_json({"seeds": list(study.seeds), "concepts": results}, study.folder / "robust.json")
    text = "\n\n".join(texts) + "\n"
    write_text(text, study.folder / "robust.md")
    return text


def _measure(study: RobustStudy, spec: ConceptSpec, seed: int) -> dict[str, dict[str, float]]:
    judge, folder = Judge(spec, study.classifier, study.counts, seed), study.folder / spec.name / f"seed_{seed}"
    reference, points = folder / ROWS[0], {"original": original_point(spec)}
    for row in ROWS:
        points[row] = run_row(spec, spec.rows[row], folder / row, seed, reference)[-1]
    original = judge.read(points["original"].pipeline_dir, folder / "original.safetensors", None)
    targets = draw_targets(judge, points["original"].pipeline_dir)
    found = {}
    for row, point in points.items():
        read = original if row == "original" else None
        read = read or judge.read(point.pipeline_dir, folder / f"{row}.safetensors", original)
        found[row] = _numbers(judge, read) | {"seconds": point.seconds}
        for name, options in (SEARCHES | (LONG if seed == 0 else {})).items():
            found[row][name] = _attacked(judge, targets, options, point, folder / "attacks" / f"{row} {name}")
    return found


def _numbers(judge: Judge, read: dict[str, Tensor]) -> dict[str, float]:
    right, classes = read["retained"].float(), judge.retained_classes
    per_class = [right[classes == index].mean().item() for index in classes.unique()]
    names = {"unseen": "unseen words", "unnamed": "not named", "attributes": "attributes", "change": "change"}
    said = {title: read[name].float().nanmean().item() for name, title in names.items()}
    return said | {"others": right.mean().item(), "worst": min(per_class)}


def _attacked(judge: Judge, targets: Tensor, options: dict, point: Point, path: Path) -> float:
    path = path.with_name(f"{path.name.replace(' ', '_').replace(',', '')}.safetensors")
    return Attack(judge, targets, **options).run(point.pipeline_dir, path).mean().item()


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row a recipe, {row: one {name: number} a seed}, each number the mean of the seeds that have it."""
    names = list(dict.fromkeys(name for numbers in rows.values() for one in numbers for name in one))
    cells = []
    for row, numbers in rows.items():
        means = {name: [one[name] for one in numbers if name in one] for name in names}
        cells.append([row, *(f"{fmean(values):.{0 if name == 'seconds' else 3}f}" for name, values in means.items())])
    return markdown_table(["row", *names], cells)
