"""Several concepts at once, one after another, and adapters composed: the runs, how all are judged, and the tables.

Whatever made a pipeline, it is judged by the same prompts and seeds: those of all concepts forgotten by then.
A row that is there and lacks a measure that came later is made again for that measure alone.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from sa_diffusers.core.fisher_file import Fisher
from sa_diffusers.data.concepts.lists import Forget, as_options
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.forgetting import measure
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import write_json, write_text
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import Options, config_from_dict, layered, option, read_values, unsaid
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs import options as run_options
from sa_diffusers.runs.adapters.chains import merge
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.inputs import read_inputs
from studies.many_attack import attacked
from studies.many_cost import stage_seconds
from studies.many_rows import (
    AT_ONCE,
    CHAINS,
    COMPOSED,
    CORE,
    DIGITS,
    FEW,
    INKS,
    KEPT,
    MIXTURE,
    ORDERS,
    QUICK,
    RECIPE,
    REPEATED,
    SHORT,
    UNIT,
)
from studies.many_tables import Judged, tables


@dataclass
class ManyConfig(Options):
    """Everything `scripts/many_study.py` can be told."""

    output_dir: str = option("runs/many_study", "Folder of the runs, study.json and study.md.")
    rows: list[str] = option(
        [], 'Rows to make, those that contain one of these texts (":": all); none: those that settle what is claimed.'
    )
    seeds: list[int] = option([0], "Seeds of each row.", least=0)
    images: float = option(
        1.0, "Pictures, as a share of 16 a concept, 24 in unseen words, 40 a kept class, 96 open ones.", above=0
    )
    requests: int = option(6, "Requests in turn.", above=0)
    attacks: int = option(
        1, "Concepts of each row at once to search for, the worst in unseen words; 0: none.", least=0
    )
    quick: bool = option(False, "Hardly anything of everything, to see that it works.")


UNNAMED = ("output_dir", "num_threads", "samples", "fisher")  # which decide nothing
COUNTS = {"eval_images_concept": 16, "eval_images_class": 40, "eval_images_other": 96}
UNSEEN = 24  # of the others
# What a run draws that serves all of the same concepts, by the names of its stages.
DRAWN = {"run": (), "surrogate": ("surrogate/surrogate.*",), "replay_samples": ("samples/without_concept.*",)}


@dataclass(frozen=True)
class Study:
    """One seed of the study."""

    config: ManyConfig
    seed: int

    def options(self, requests: Sequence[Forget], changes: Mapping[str, Any]) -> run_options.RunOptions:
        """Of a run; evaluated by one picture of each kind, since it is judged here."""
        config = run_options.ForgetConfig  # of the methods that are known by now
        few = dict.fromkeys(("eval_images_concept", "eval_images_class", "eval_images_other"), 1)
        common = read_values(config, "bundled/digits_many") | as_options(list(requests)) | few
        common |= {"seed": self.seed, "track_steps": None, "checkpointing_steps": None, "num_threads": None}
        small = {name: value for name, value in QUICK.items() if self.config.quick}
        return config_from_dict(config, layered(config, common, changes, small))

    def folder(self, requests: Sequence[Forget], changes: Mapping[str, Any]) -> Path:
        """Of a run; its name says all that decides it."""
        config, home = self.options(requests, changes), str(Path(self.config.output_dir))
        left_out = {*UNNAMED, *unsaid(config)}
        said = vars(config) | {
            n: v for n, v in vars(config.resolved()).items() if n.startswith("robust_")
        }  # as before
        values = {name: str(value).replace(home, "") for name, value in said.items() if name not in left_out}
        values |= {"fisher": UNIT} if config.fisher == UNIT else {}
        return Path(home) / f"seed_{self.seed}" / f"{requests[-1].concept.split(',')[0]}-{fingerprint(values)}"

    def run(
        self, requests: Sequence[Forget], changes: Mapping[str, Any], before: Sequence[Forget] = ()
    ) -> tuple[Path, float]:
        """The folder of a run, and the seconds that it took for what is new, if others have drawn it or not.

        Args:
            before: what the chain that it goes on has forgotten.
        """
        config, folder, first = self.options(requests, changes), self.folder(requests, changes), [DIGITS["seven"]]
        config.output_dir = str(folder)
        own = {"after", "model", "method", *FEW} & changes.keys()  # another model, or none of these samples
        own -= {"method"} if config.fisher == UNIT else set()
        if (not own or config.fisher == UNIT) and folder != self.folder(first, RECIPE):
            shared = self.run(first, RECIPE)[0]
            config.samples, estimated = str(shared / "samples"), shared / "fisher.safetensors"
            config.fisher = str(unit_fisher(estimated) if config.fisher == UNIT else estimated)
        decided = changes.get("model"), config.num_samples, config.replay_negative
        drawn = [one.concept for one in (*before, *requests)], decided
        store = folder.parent / "drawn" / fingerprint({"drawn": drawn})
        copy_drawn(store, folder)
        seconds = run_forgetting(config).metrics["seconds"]
        copy_drawn(folder, store)
        return folder, seconds["surrogate"] + seconds["train"]

    def judge(
        self, pipeline: Path | str, forgotten: Sequence[Forget], share: float = 1.0, rest: bool = False, **said: Any
    ) -> dict[str, Any]:
        """What a pipeline does, by the examination of what has been forgotten, and of the digits that always stay.

        Args:
            rest: judge every digit that it keeps, which are "rest" of what is returned.
        """
        share *= 0.1 if self.config.quick else self.config.images
        counts = {name: max(1, round(share * count)) for name, count in COUNTS.items()}
        config = self.options(forgotten, counts)
        inputs = read_inputs(config)
        judge, sets, other = next(iter(inputs.judges.values())), dict(inputs.sets), counts["eval_images_other"]
        unseen = max(1, round(share * UNSEEN))
        sets["unseen"] = sets["unseen"].take([i for i in range(len(sets["unseen"])) if i % other < unseen])
        labels = sets["retained"].labels
        stays = [i for i, one in enumerate(labels) if rest or not DIGITS.keys() & set(one.values())]
        sets["retained"] = sets["retained"].take(stays)
        family = get_family(load_pipeline(str(pipeline), None, None, "float32"), sampler=config.sampler)
        values, _ = measure(judge, sets, draw_sets(family, sets, config.judged))
        seen, unseen = (
            values[f"{name}_by_concept"] or {forgotten[0].concept.split(",")[0]: values[name]}
            for name in ("concept_probability", "concept_probability_unseen")
        )
        by_class = values["retained_accuracy_by_class"]
        kept = {name: by_class.get(name) for name in KEPT}
        said |= {"rest": {name: by_class[name] for name in (*KEPT, *DIGITS) if name in by_class}} if rest else {}
        share = fmean(value for value in kept.values() if value is not None)
        worst = max(seen.values())
        return said | {
            "seen": seen,
            "unseen": unseen,
            "kept": share,
            "kept worst": min(value for value in kept.values() if value is not None),
            "attributes": values["attribute_accuracy"],
            "open": values["concept_rate_when_unnamed"],
            "H_o": 2 * (1 - worst) * share / max(1 - worst + share, 1e-9),
        }

    def original(self, forgotten: Sequence[Forget], known: Judged | None) -> Judged:
        return known or [self.judge(resolve("bundled/digits/pipeline"), forgotten, seconds=0.0)]

    def at_once(self, requests: Sequence[Forget], changes: Mapping[str, Any], known: Judged | None) -> Judged:
        """`known`: what has been found of this row, as of all; what that lacks is added."""
        wanted = min(self.config.attacks, len(requests))
        if known and "stages" in known[-1] and len(known[-1].get("attacks", ())) >= wanted:
            return known
        folder, seconds = self.run(requests, changes)
        found = dict(known[-1]) if known else self.judge(folder / "pipeline", requests, seconds=seconds)
        found["stages"] = stage_seconds(folder)
        words = sorted(found["unseen"], key=found["unseen"].__getitem__, reverse=True)[:wanted]
        steps = 4 if self.config.quick else 200
        found["attacks"] = found.get("attacks", {}) | {
            one.concept.split(",")[0]: attacked(folder / "pipeline", one, self.options([one], {}), steps)
            for one in requests
            if one.concept.split(",")[0] in set(words) - found.get("attacks", {}).keys()
        }
        return [found]

    def in_turn(self, order: Sequence[str], changes: Mapping[str, Any], memory: bool, known: Judged | None) -> Judged:
        """Judged after every request: with memory of those before, or each from the last result."""
        if known and all("stages" in one for one in known):
            return known
        found, last, wanted = [], None, [DIGITS[name] for name in order[: self.config.requests]]
        for number, request in enumerate(wanted, 1):
            own = {} if last is None else {"after": str(last)} if memory else {"model": str(last / "pipeline")}
            # A first request has nothing to carry on: it is the same run for all that differ in that alone.
            usual = {n: value for n, value in changes.items() if last or not n.startswith("chain_")}
            last, seconds = self.run([request], usual | own, wanted[: number - 1] if memory else ())
            said = {"seconds": seconds, "request": request.concept}
            share = 1.0 if number == len(wanted) else 0.5
            one = known[number - 1] if known else self.judge(last / "pipeline", wanted[:number], share, **said)
            found.append(one | {"stages": stage_seconds(last, first=number == 1)})
        return found

    def composed(self, known: Judged | None, full: bool = False) -> Judged:
        """Each of six adapters alone, every pair, all by their sum, and all by TIES.

        Args:
            full: judged by all pictures and by every digit that is kept, of two adapters four more than of six.
        """
        if known:
            return known
        digits = list(DIGITS)[: self.config.requests]
        run, seconds = self.run([DIGITS[name] for name in digits], SHORT | {"adapters": "each"})
        sizes = sorted({1, min(2, len(digits)), len(digits)})
        wanted = [(names, None) for size in sizes for names in combinations(digits, size)]
        found = []
        for names, density in [*wanted, *((tuple(digits), density) for density in (0.2, 0.5, 1.0))]:
            said = " ".join(names) + ("" if density is None else f", TIES {density:g}")
            folder = run.with_name(f"{run.name}-{said.replace(' ', '_').replace(',', '')}")
            merge(run, folder, names, density)
            chosen = [DIGITS[name] for name in names]
            share = 1.0 if full or len(names) == len(digits) else 0.5
            said = {"adapters": said, "seconds": seconds / len(digits)}
            found.append(self.judge(folder / "pipeline", chosen, share, full, **said))
        return found

    def rows(self) -> Iterator[tuple[str, Callable[[Judged | None], Judged]]]:
        """Name of each row, and what makes it, or adds to what is known of it."""
        digits = list(DIGITS.values())
        for count in (1, 3, 6):
            yield f"at once, {count}: original", partial(self.original, digits[:count])
            for name, changes in AT_ONCE.items():
                yield f"at once, {count}: {name}", partial(self.at_once, digits[:count], changes)
        yield "at once, digits and inks: original", partial(self.original, INKS)
        for name, changes in AT_ONCE.items():
            if changes is MIXTURE:  # which is of one kind
                continue
            yield f"at once, digits and inks: {name}", partial(self.at_once, INKS, changes)
        for order, names in ORDERS.items():
            for name, changes in CHAINS.items():
                yield f"in turn{order}: {name}", partial(self.in_turn, names, SHORT | changes, True)
            for name, changes in REPEATED.items():
                yield f"in turn{order}: {name}", partial(self.in_turn, names, changes, False)
        yield "composed", self.composed
        yield COMPOSED, partial(self.composed, full=True)


def copy_drawn(source: Path, target: Path) -> None:
    """What a run has drawn, with the marks of its stages: another takes it, whose keys must say the same."""
    for stage, patterns in DRAWN.items():
        mark = Path(".stages") / f"{stage}.json"
        if (source / mark).exists() and not (target / mark).exists():
            for file in (*(path for pattern in patterns for path in source.glob(pattern)), source / mark):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def unit_fisher(path: Path) -> Path:
    """A file beside a Fisher's, of the same model and the same sum, all of whose values are equal."""
    found, unit = Fisher.load(path), path.with_name("unit.safetensors")
    count = sum(tensor.numel() for tensor in found.tensors.values())
    mean = sum(tensor.double().sum() for tensor in found.tensors.values()) / count
    Fisher({name: tensor.new_full(tensor.shape, mean) for name, tensor in found.tensors.items()}, found.metadata).save(
        unit
    )
    return unit


def run_study(config: ManyConfig) -> dict[str, dict[str, Judged]]:
    """{row: {seed: judgements}} of all rows that there are, in study.json and, as tables, study.md."""
    path = Path(config.output_dir) / "study.json"
    settings = {"images": config.images, "requests": config.requests, "quick": config.quick}
    there = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": {}}
    if there["settings"] != settings:
        raise ValueError(f"{path} was made with {there['settings']}, got {settings}; pass another --output_dir")
    found, names = there["rows"], [name for name, _ in Study(config, 0).rows()]
    if config.rows and not any(text in name for name in names for text in config.rows):
        raise ValueError(f"expected rows of {'; '.join(names)}; got {config.rows}")
    for seed in config.seeds:
        for name, make in Study(config, seed).rows():
            asked = any(text == name if text in names else text in name for text in config.rows or CORE)
            known = found.get(name, {}).get(str(seed))
            if asked and (made := make(known)) is not known:
                found.setdefault(name, {})[str(seed)] = made
                there["rows"] = found = {row: found[row] for row in names if row in found}  # whenever they were made
                write_json(there, path)
    write_text(tables(found), path.with_name("study.md"))
    return found
