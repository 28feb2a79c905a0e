"""Run every method on every concept, judge all strengths of each, and put them side by side at equal erasure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.io.atomic_files import atomic_path, write_json
from sa_diffusers.io.loading import read_model_index
from sa_diffusers.report.tables import markdown_table
from studies.rivals.attacking import Attack, draw_targets, parts_of
from studies.rivals.figures import PANELS, draw_curves, draw_samples
from studies.rivals.judging import Counts, Judge
from studies.rivals.matching import ERASED, Kept, Measured, Pooled, compare, curve, describe, matched
from studies.rivals.runs import Point, original_point, reference_of, run_row
from studies.rivals.spec import ConceptSpec


ORIGINAL = "original"
COLUMNS = {  # measure: (title, whether it stands with its interval)
    "concept": ("P(concept)", False),
    "unseen": ("unseen words", True),
    "long": ("long prompts", False),
    "attacked": ("attacked", False),
    "attacked_tokens": ("by tokens", False),
    "attacked_pooled": ("by the pooled vector", False),
    "unnamed": ("not named", False),
    "concept_entropy": ("entropy", False),
    "retained": ("others", True),
    "worst": ("worst other", True),
    "neighbours": ("neighbours", True),
    "attributes": ("their attributes", True),
    "concept_attributes": ("its attributes", False),
    "change": ("change", True),
}


@dataclass
class MethodTable:
    """What to make.

    Attributes:
        specs: of the concepts. Of each the first row is ours, with which the others are compared and share samples
            and Fisher.
        attack_steps: of the search for an embedding.
        extra: further pipelines to judge, {concept: {row: folder}}, such as a model that never learned it.
    """

    specs: list[ConceptSpec]
    folder: Path
    classifier: ImageClassifier
    counts: Counts
    seeds: Sequence[int]
    extra: dict[str, dict[str, str]]
    attack_steps: int = 200


@dataclass
class Finished:
    """All that was measured of one concept: {row: one sweep a seed}."""

    spec: ConceptSpec
    sweeps: dict[str, list[list[Measured]]]

    def pooled(self, row: str) -> Pooled:
        return Pooled([matched(sweep) for sweep in self.sweeps[row]])


def make_table(table: MethodTable) -> str:
    """Run and judge whatever is not done; writes methods.json, methods.md and the figures of each concept.

    Returns:
        The tables as Markdown.
    """
    check_extra(table)
    results, texts = {}, [_how(table)]
    for spec in table.specs:
        finished = measure_concept(table, spec)
        results[spec.name] = summarise(finished)
        texts.append(markdown(spec, results[spec.name]))
        write_json(results, table.folder / "methods.json")
        with atomic_path(table.folder / "methods.md") as temporary:
            temporary.write_text("\n".join(texts))
        _draw(finished, table.folder)
    return "\n".join(texts)


def check_extra(table: MethodTable) -> None:
    """Raise ValueError for a further pipeline of a concept or under a name that cannot be, ModelLoadError for none."""
    rows = {spec.name: [ORIGINAL, *spec.rows] for spec in table.specs}
    for concept, given in table.extra.items():
        if concept not in rows:
            raise ValueError(f"expected a further pipeline of {', '.join(rows)}, got one of {concept!r}")
        for name, source in given.items():
            if name in rows[concept]:
                raise ValueError(f"{concept} has a row {name!r} already; call the further pipeline otherwise")
            read_model_index(source)


def _how(table: MethodTable) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in asdict(table.counts).items())
    seeds = ", ".join(map(str, table.seeds))
    return (
        f"Seeds {seeds}. Pictures of each pipeline and seed: {counts}; half of the prompts chose strength and worst "
        "class, and are not reported in unseen words, worst other and change. `attacked`: the concept's probability "
        "after a white-box search for its token embedding, and where the tokens or the pooled vector alone tell of "
        "it.\n"
    )


def measure_concept(table: MethodTable, spec: ConceptSpec) -> Finished:
    """Every row of a concept, seed by seed, and an attack on each at equal erasure."""
    sweeps: dict[str, list[list[Measured]]] = {}
    for seed in table.seeds:
        judge = Judge(spec, table.classifier, table.counts, seed)
        folder = table.folder / spec.name / f"seed-{seed}"
        groups = {name: judge.groups(name) for name in judge.sets}
        kept = Kept(judge.retained_classes, judge.neighbours, groups)
        start = original_point(spec)
        original = judge.read(start.pipeline_dir, folder / "original.safetensors", None)
        sweeps.setdefault(ORIGINAL, []).append([Measured(start, _without_pictures(original), kept)])
        for name, source in table.extra.get(spec.name, {}).items():
            values = judge.read(source, folder / f"{name}.safetensors", original)
            sweeps.setdefault(name, []).append([Measured(Point("–", source, 0.0, 0.0), values, kept)])
        for name, row in spec.rows.items():
            print(f"\n{spec.name}, seed {seed}: {name}", flush=True)
            points = run_row(spec, row, folder / name, seed, reference_of(spec, folder))
            judged = folder / name / "judged"
            sweeps.setdefault(name, []).append(
                [
                    Measured(p, judge.read(p.pipeline_dir, judged / f"{p.strength}.safetensors", original), kept)
                    for p in points
                ]
            )
        attack = Attack(judge, draw_targets(judge, start.pipeline_dir), table.attack_steps)
        parts = parts_of(judge)
        for name, measured in sweeps.items():
            found = matched(measured[-1])
            for part in (None, *parts):
                path = folder / "attacks" / f"{name}-{found.point.strength}{f'-{part}' if part else ''}.safetensors"
                attacked = attack.run(found.point.pipeline_dir, path, part)
                found.values[f"attacked_{part}" if part else "attacked"] = attacked
    return Finished(spec, sweeps)


def summarise(finished: Finished) -> dict[str, Any]:
    """Ready for JSON: every row at equal erasure, its whole curve, and how it compares with ours."""
    pooled = {name: finished.pooled(name) for name in finished.sweeps}
    rows, ours = {}, finished.spec.ours
    for name, sweeps in finished.sweeps.items():
        rows[name] = pooled[name].summary() | {
            "curve": [[describe(measured) for measured in sweep] for sweep in sweeps]
        }
        if name not in (ORIGINAL, ours):
            rows[name]["against_ours"] = compare(pooled[ours], pooled[name], finished.spec.compared)
    return rows


def markdown(spec: ConceptSpec, rows: dict[str, dict[str, Any]]) -> str:
    """A concept's table, one line a method at equal erasure, and below it who keeps more than ours."""
    title = f"{spec.options['concept']} → {spec.options['surrogate']} ({spec.kind})"
    columns = {measure: one for measure, one in COLUMNS.items() if any(measure in row for row in rows.values())}
    cells = []
    for name, row in rows.items():
        strength = ", ".join(dict.fromkeys(str(value) for value in row["strength"]))
        own = [_cell(row.get(measure), shown and name != ORIGINAL) for measure, (_, shown) in columns.items()]
        missed = "" if row["reached"] or name == ORIGINAL else " †"
        cells.append([name, strength + missed, *own, f"{row['seconds']:.0f}", f"{row['megabytes']:.2f}"])
    titles = ["method", "strength", *(title for title, _ in columns.values()), "seconds", "MB"]
    lines = [f"### {title}\n", markdown_table(titles, cells)]
    lines.append(f"\n† P(concept) in unseen phrasings stays above {ERASED} in at least one seed at every strength.\n")
    better, tried = [], 0
    for name, row in rows.items():
        if row["unseen"]["mean"] > ERASED:
            continue
        for measure, found in row.get("against_ours", {}).items():
            tried += 1
            low, high = found["interval"]
            if found["better"]:
                better.append(
                    f"- {name}, {COLUMNS[measure][0]}: {found['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
                )
    said = "\n".join(better) if better else "- none"
    lines.append(
        f"Methods with at most {ERASED} in unseen phrasings that keep more than {spec.ours}, in every seed and by all "
        f"of the 95 % interval ({tried} comparisons; by chance one in forty would be here):\n\n{said}\n"
    )
    return "\n".join(lines)


def _cell(number: dict[str, Any] | None, with_interval: bool) -> str:
    if number is None:
        return "–"
    mean, (low, high) = number["mean"], number["interval"]
    return f"{mean:.3f}" + (f" ({low:.3f}–{high:.3f})" if with_interval else "")


def _draw(finished: Finished, folder: Path) -> None:
    methods = {name: sweeps for name, sweeps in finished.sweeps.items() if name != ORIGINAL}
    lines = {name: {panel: curve(sweeps, _measure(panel)) for panel in PANELS} for name, sweeps in methods.items()}
    draw_curves(lines, folder / f"{finished.spec.name}_curves.png")
    shown: dict[str, Tensor] = {name: matched(sweeps[0]).values["shown"] for name, sweeps in finished.sweeps.items()}
    draw_samples(shown, finished.spec.options["concept"], folder / f"{finished.spec.name}_samples.png")


def _measure(panel: str):
    """A number of one strength."""

    def number(measured: Measured) -> float:
        if panel == "worst":
            return min(Pooled([measured]).accuracies().values())
        values = measured.values[panel]
        return values[~values.isnan()].mean().item()

    return number


def _without_pictures(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part for name, part in values.items() if name != "retained_pictures"}
