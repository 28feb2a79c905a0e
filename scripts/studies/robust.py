"""How well it stays forgotten: recipes, rivals, the original and a model that never learned it under every attack."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from sa_diffusers.attacks import FoundEmbedding
from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.attacks.plan import ALL, ON_OTHERS
from sa_diffusers.attacks.results import read
from sa_diffusers.attacks.run import AttackRun
from sa_diffusers.attacks.victims import load_family
from sa_diffusers.evaluation.intervals import wilson_interval
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.io.atomic_files import write_json, write_text
from sa_diffusers.io.loading import pipeline_hashes
from sa_diffusers.report.tables import markdown_table
from studies.rivals.judging import Counts, Judge
from studies.rivals.matching import Kept, Measured, matched
from studies.rivals.runs import original_point, reference_of, run_row
from studies.rivals.spec import ConceptSpec


ORIGINAL, EDIT, ROBUST, NEVER = "original", "sa-edit", "sa-robust", "never"
CONTROLS = (ORIGINAL, NEVER)  # attacked once each
OURS = ("sa-", *CONTROLS)
VECTORS = ("one vector", "four vectors")
RELEARN, RELEARNED = {"attack": "relearn", "steps": 150, "num_tokens": 1}, "relearned"
LOOKS = 25  # steps of relearning from one look to the next
SEARCHES = {
    **{label: ALL[label] for label in (*VECTORS, "two words")},
    RELEARNED: RELEARN | {"relearn_every": LOOKS},
    **{label: options for label, options in ALL.items() if options["attack"] in ("quantized", "merged")},
}
# Of seed 0 alone. The long search, of our rows and controls, goes beyond what training used: it takes as long as all
# others.
LONG = {"four vectors, 1,000 steps": {"num_tokens": 4, "steps": 1000}}
ONCE = LONG | {"two real words": ALL["two real words"], ON_OTHERS: RELEARN | {"relearn_every": 0}}
# Where the searches stand; recipes and their settings were chosen by others, those of configs/paper/digits*.
TEMPLATES = {
    "local": ["write a {}", "show the {}", "a handwritten {}", "a single {}", "paint a neat {}", "the figure {}"],
    "global": [
        "write a {} numeral", "a neat {} figure", "a number drawn in {}", "a digit painted {}",
        "a numeral using {} ink", "show a character in {}",
    ],
    "style": [
        "write a {} numeral", "a neat {} figure", "a number with a {} pen", "a digit in {} lines",
        "a numeral in a {} hand", "show a character with {} lines",
    ],
}  # fmt: skip
FULL = Counts(concept=40, unseen=300, unnamed=300, long=20, retained=900)  # pictures of each pipeline and seed
ATTACKED = 100  # of each search
BACK = 0.5  # the concept's probability from which on it is there again
LOWEST = "worst, low end of its interval"
BARS = {"seven": (0.02, 0.08, 1.75), "red": (0.02, 0.08, 2.0), "bold": (0.05, 0.40, 1.75)}

Numbers = dict[str, Any]  # of one row and seed, by measure: a number, or one of each search


@dataclass
class RobustStudy:
    """What to make: of every concept and seed each row and attack, kept in the folder as soon as it is there.

    Attributes:
        specs: of the concepts; all of their rows are made, rivals at equal erasure.
        never: folder of a pipeline that never learned a concept, {} in its name's place; there is one or not.
        attacks: options by label; those of `ONCE` are made of seed 0 alone, of `LONG` not for rivals.
        once: rows that are made of the first seed alone.
        restarts: searches for vectors. share: of `FULL` and `ATTACKED`, the pictures.
    """

    specs: list[ConceptSpec]
    folder: Path
    classifier: ImageClassifier
    seeds: Sequence[int]
    never: str = "runs/digits_without_{}/pipeline"
    restarts: int = 3
    share: float = 1.0
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SEARCHES | ONCE)
    once: Sequence[str] = ()

    @property
    def counts(self) -> Counts:
        return FULL.scaled(self.share)

    @property
    def attacked(self) -> int:
        return max(1, round(ATTACKED * self.share))


def make_study(study: RobustStudy) -> str:
    """Run, judge and attack whatever is not done; robust.json and robust.md, which it returns, grow with each."""
    concepts: dict[str, dict[str, list[Numbers]]] = {}
    settings = {"seeds": list(study.seeds), "searches": study.restarts, "attacked": study.attacked}
    settings |= {"pictures": asdict(study.counts), "classifier": dict(study.classifier.config.accuracy or {})}
    text = ""
    for spec in study.specs:
        rows = concepts.setdefault(spec.name, {})
        for seed in study.seeds:
            of_seed: dict[str, Numbers] = {}
            left = study.once if seed != study.seeds[0] else ()
            own = replace(spec, rows={name: row for name, row in spec.rows.items() if name not in left})
            for row, numbers in _measured(study, own, seed):
                if row not in of_seed:
                    rows.setdefault(row, []).append(of_seed.setdefault(row, {}))
                of_seed[row].update(numbers)
                result = settings | {"concepts": concepts}
                text = markdown(result)
                write_json(result, study.folder / "robust.json")
                write_text(text, study.folder / "robust.md")
    return text


def _measured(study: RobustStudy, spec: ConceptSpec, seed: int) -> Iterator[tuple[str, Numbers]]:
    judge, folder = Judge(spec, study.classifier, study.counts, seed), study.folder / spec.name / f"seed_{seed}"
    victims = {ORIGINAL: original_point(spec).pipeline_dir}
    original = judge.read(victims[ORIGINAL], folder / "original.safetensors", None)
    yield ORIGINAL, _numbers(judge, original)
    never = study.never.format(spec.name)
    if Path(never).exists():
        victims[NEVER] = never
        yield NEVER, _numbers(judge, judge.read(never, folder / "never.safetensors", original))
    kept = Kept(judge.retained_classes, judge.neighbours, {name: judge.groups(name) for name in judge.sets})
    for name, row in spec.rows.items():
        print(f"\n{spec.name}, seed {seed}: {name}", flush=True)
        points = run_row(spec, row, folder / name, seed, reference_of(spec, folder))
        points = points[-1:] if name.startswith((EDIT, ROBUST)) else points  # those are judged as they ship
        paths = {point: folder / name / "judged" / f"{point.strength}.safetensors" for point in points}
        values = {point: judge.read(point.pipeline_dir, path, original) for point, path in paths.items()}
        found = matched([Measured(point, read, kept) for point, read in values.items()])
        victims[name] = found.point.pipeline_dir
        own = {"strength": str(found.point.strength), "seconds": found.point.seconds}
        yield name, own | _numbers(judge, found.values)
    yield from attacked(study, judge, folder / "attacks", victims)


def _numbers(judge: Judge, read: dict[str, Tensor]) -> Numbers:
    right, classes = read["retained"].float(), judge.retained_classes
    sets = [right[classes == index] for index in classes.unique()]
    worst, count = min((one.mean().item(), len(one)) for one in sets)
    names = {"unseen": "unseen words", "unnamed": "not named", "attributes": "attributes", "change": "change"}
    said = {title: read[name].float().nanmean().item() for name, title in names.items()}
    near = {"neighbours": right[judge.neighbours].mean().item()} if judge.neighbours.any() else {}
    lowest = {LOWEST: wilson_interval(worst, count)[0]} if "retained_pictures" in read else {}
    return said | {"others": right.mean().item(), "worst": worst} | lowest | near


def attacked(
    study: RobustStudy, judge: Judge, folder: Path, victims: Mapping[str, str]
) -> Iterator[tuple[str, Numbers]]:
    """(row, numbers) of each attack in turn, the long ones last; of vectors also those found in the plain edit.

    Args:
        victims: folder of each row's pipeline, the original's first and then the controls'.
    """
    drawn_as = {name: getattr(judge.config, name) for name in ("guidance_scale", "num_inference_steps", "sampler")}
    config = AttackConfig(
        original=victims[ORIGINAL], forgotten=victims[EDIT], concept=judge.config.concept,
        templates=TEMPLATES[judge.spec.kind], num_images=study.attacked, seed=judge.seed, output_dir=str(folder),
        overwrite=True, classifier="the study's", **drawn_as,
    )  # fmt: skip
    families = {row: load_family(config, pipeline) for row, pipeline in victims.items()}
    hashes = {row: pipeline_hashes(family.pipeline) for row, family in families.items()}
    for label, options in study.attacks.items():
        if label in ONCE and judge.seed:
            continue
        prompts = [template.format(judge.config.surrogate) for template in config.templates] * (label == ON_OTHERS)
        run, found = AttackRun(replace(config, **options, relearn_prompts=prompts), label), {}
        run.draw_targets(families[ORIGINAL], hashes[ORIGINAL])
        for row, family in families.items():
            if (label in LONG and not row.startswith(OURS)) or (run.config.attack == "merged" and row == NEVER):
                continue  # what was trained apart is not merged
            print(f"\n{judge.spec.name}, seed {judge.seed}: {row}, {label}", flush=True)
            restarts = study.restarts if run.config.attack == "embedding" and row not in CONTROLS else 1
            run.config = replace(run.config, num_restarts=restarts)
            result = run.attack(row, victims[row], family, hashes[row])
            found[row] = result.found
            after = [_probability(judge, pictures) for pictures in result.after]
            yield row, {"asked by name": _probability(judge, result.before)}
            for steps, pictures in result.on_the_way[0].items():
                yield row, {f"{label} {steps} steps": [_probability(judge, pictures)]}
            yield row, {f"{label} {run.config.steps} steps" if run.config.attack == "relearn" else label: after}
            if run.config.attack == "embedding" and EDIT in found and row not in (EDIT, *CONTROLS):
                transferred = _transferred(run, row, family, hashes[row], found[EDIT])
                yield row, {f"{label} of {EDIT}": [_probability(judge, pictures) for pictures in transferred]}


def _transferred(
    run: AttackRun, row: str, family: Family, hashes: dict[str, str], found: Sequence[FoundEmbedding]
) -> list[Tensor]:
    """Pictures by vectors that were found in another model: a masked gradient stops a search, but not these."""
    keys = [{"of": hash_tensors({"vectors": one.vectors})} for one in found]
    return [
        run.pictures(row, f"transferred-{run.label}{number}", family, hashes, one, key)
        for number, (one, key) in enumerate(zip(found, keys, strict=True))
    ]


def _probability(judge: Judge, pictures: Tensor) -> float:
    return read(judge.judge, pictures)["probability"]


def mean(rows: Mapping[str, Sequence[Numbers]], row: str, name: str) -> float | None:
    """Of a row's seeds that have a measure, and its searches; None: none has."""
    values = [one[name] for one in rows.get(row, []) if name in one]
    flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
    return fmean(flat) if flat else None


def curve(rows: Mapping[str, Sequence[Numbers]], row: str) -> dict[int, float]:
    """P of the concept, asked for by name, after so many steps of relearning; empty where it was not relearned."""
    names = {0: "asked by name"} | {n: f"{RELEARNED} {n} steps" for n in range(LOOKS, RELEARN["steps"] + 1, LOOKS)}
    points = {steps: mean(rows, row, name) for steps, name in names.items()}
    known = {steps: point for steps, point in points.items() if point is not None}
    return known if len(known) > 1 else {}


def back_after(points: Mapping[int, float]) -> str:
    """Steps until P is .5, on straight lines between the looks."""
    before = 0, 0.0
    for steps, point in points.items():
        if point >= BACK:
            return (
                f"{before[0] + (BACK - before[1]) / (point - before[1]) * (steps - before[0]):.0f}" if steps else "0"
            )
        before = steps, point
    return f"over {before[0]}"


def table(rows: Mapping[str, Sequence[Numbers]]) -> str:
    """Markdown: a line a measure, a column a row of the study, each number the mean of seeds and searches."""
    found = dict.fromkeys((name, isinstance(one[name], list)) for row in rows.values() for one in row for name in one)
    names = [name for name, _ in sorted(found, key=lambda one: one[1])]  # attacks below all else
    cells = []
    for name in names:
        if name == "strength":
            said = [", ".join(dict.fromkeys(one.get(name, "–") for one in row)) for row in rows.values()]
        else:
            numbers, spec = [mean(rows, row, name) for row in rows], ".0f" if name == "seconds" else ".3f"
            said = [None if number is None else f"{number:{spec}}" for number in numbers]
        cells.append([name, *said])
    if any(curves := [curve(rows, row) for row in rows]):
        cells.append(["steps of relearning until it is back", *(back_after(one) if one else None for one in curves)])
    return markdown_table(["", *rows], cells)


SHORT = ("unseen words", "not named", *VECTORS, "two words", "relearned 50 steps", "others", "worst", "change")


def short_table(result: Mapping[str, Any], concept: str) -> str:
    """Markdown: a line a row of the study, the measures that tell most."""
    rows = result["concepts"][concept]
    cells = [[row, *(mean(rows, row, name) for name in SHORT)] for row in rows]
    said = [[row, *(None if one is None else f"{one:.3f}" for one in found)] for row, *found in cells]
    return markdown_table(["", *SHORT], said)


def bars(concept: str, result: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(what, at most, found) of the robust recipe; what has not been measured is left out."""
    rows, (unseen, attacked, change) = result["concepts"][concept], BARS.get(concept, BARS["seven"])

    def of(name: str, row: str = ROBUST) -> float:
        number = mean(rows, row, name)
        return float("nan") if number is None else number

    def share(name: str, row: str) -> float:
        return of(name) / max(of(name, row), 1e-9)

    def lost(name: str) -> float:
        return of(name, ORIGINAL) - of(name)

    searches = (*VECTORS, *LONG)
    found = [
        ("unseen words", unseen, of("unseen words")),
        ("not named, share of the original's", 0.3, share("not named", ORIGINAL)),
        *((label, attacked, of(label)) for label in searches),
        *((f"{label}, share of {EDIT}'s", 0.5, share(label, EDIT)) for label in (*searches, "two words")),
        *((f"{name} lost", 0.01, lost(name)) for name in ("others", "neighbours", "attributes")),
        ("worst lost", of("worst", ORIGINAL) - of(LOWEST, ORIGINAL), lost("worst")),
        (f"change, times {EDIT}'s", change, share("change", EDIT)),
        ("seconds", 120, of("seconds")),
    ]
    return [one for one in found if one[2] == one[2]]


def markdown(result: Mapping[str, Any]) -> str:
    """Of each concept the table, and what the recipe must reach."""
    texts = []
    for concept, rows in result["concepts"].items():
        cells = [[what, f"{most:.3g}", f"{found:.3g}", "" if found <= most else "missed"] for what, most, found in
                 bars(concept, result)]  # fmt: skip
        texts += [f"**{concept}**", table(rows)]
        texts += [markdown_table([ROBUST, "at most", "found", ""], cells)] if cells else []
    return "\n\n".join(texts) + "\n"
