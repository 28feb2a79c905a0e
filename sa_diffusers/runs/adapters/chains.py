"""Chains of runs, one request after another; and pipelines of some of the adapters that they left."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from sa_diffusers.core.concepts import fold, split_phrasings
from sa_diffusers.data.concepts.lists import Forget, as_options
from sa_diffusers.families import checked_family
from sa_diffusers.io.configuration import config_from_dict, layered
from sa_diffusers.io.loading import copy_pipeline
from sa_diffusers.runs import options as run_options
from sa_diffusers.runs.chain import Link, Merge, chain_of, shared_by
from sa_diffusers.runs.forget import Outcome, forget, run_forgetting


# Options of a run that are none of what is made of its adapters.
OWN = {
    **dict.fromkeys(("concepts", "after", "strength", "before", "early_stop", "quantize_base")),
    "strength_sheet": False, "save_single_file": False,
    "chain_fisher": "first", "push_to_hub": False, "overwrite": False, "snapshot_steps": [],
}  # fmt: skip


def forget_sequence(
    pipeline: DiffusionPipeline, requests: Sequence[Forget | Sequence[Forget]], output_dir: str | Path, **options: Any
) -> DiffusionPipeline:
    """Make a pipeline forget one request after another, each with memory of those before it; see the option `after`.

    Args:
        requests: one concept or several each.
        output_dir: run i, from 1 on, is in the folder i of it, and is not computed again.
        options: as of `forget`, for every request; the given pipeline is changed, `inplace`, after the last.

    Returns:
        What the last request leaves. Raises as `forget`.
    """
    rows = [[request] if isinstance(request, Forget) else request for request in requests]
    folders = [str(Path(output_dir) / str(number)) for number in range(1, len(rows) + 1)]
    cls, defaults = run_options.ForgetConfig, checked_family(pipeline).defaults
    said = {name: value for name, value in options.items() if name in cls.__dataclass_fields__}
    for asked, after in zip(rows[1:], folders, strict=False):  # what cannot follow is refused before the first run
        config_from_dict(cls, layered(cls, defaults, as_options(asked, after=after, **said)))
    inplace, forgotten = options.pop("inplace", False), pipeline
    for asked, folder, after in zip(rows, folders, [None, *folders], strict=False):
        last = inplace and folder == folders[-1]  # every request is one of the original
        forgotten = forget(pipeline, asked, output_dir=folder, after=after, inplace=last, **options)
    return forgotten


def unforget(
    run: str | Path, concept: str, output_dir: str | Path, pipeline: DiffusionPipeline | None = None
) -> DiffusionPipeline:
    """Take one concept of a chain back: the original with all of its adapters but that concept's.

    Args:
        run: folder of the last run of a chain, or of one with an adapter a concept.
        concept: one of its phrasings.
        output_dir: gets a run's folder: pipeline, page and numbers, before as the run left it.
        pipeline: the original; None: loaded as the run did.

    Returns:
        A pipeline as `forget` returns.

    Raises:
        ValueError: no finished run, another's concept, no adapter of that concept alone, or nothing else is forgotten.
    """
    return take_back(run, concept, output_dir, pipeline).pipeline


def take_back(
    run: str | Path, concept: str, output_dir: str | Path, pipeline: DiffusionPipeline | None = None
) -> Outcome:
    """As `unforget`, with numbers."""
    links = chain_of(str(run))
    (back,) = _named(links, [concept])
    kept = [name for name in _phrasings(links) if name != back]
    if not kept:
        raise ValueError(f"{back!r} is all that {run} has forgotten: use its original, {links[-1].options['model']}")
    command = f"sa-diffusers unforget {shlex.quote(str(run))} --concept {shlex.quote(concept)}"
    return _merge(links, kept, output_dir, pipeline, density=None, taken_back=back, command=command)


def merge(
    run: str | Path,
    output_dir: str | Path,
    concepts: Sequence[str] = (),
    density: float | None = None,
) -> Outcome:
    """Make a plain pipeline of the adapters of some concepts of a chain.

    Args:
        run, output_dir: as of `unforget`; numbers are before as of the original.
        concepts: a phrasing of each; none: all.
        density: of TIES; None: the changes are added.

    Raises:
        ValueError: as `unforget`; a density out of (0, 1].
    """
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"expected a density above 0 and at most 1, got {density:g}")
    links = chain_of(str(run))
    kept = _named(links, concepts) if concepts else list(_phrasings(links))
    how = [] if density is None else ["--how", "ties", "--density", f"{density:g}"]
    command = shlex.join(["sa-diffusers", "merge", str(run), *how, *(["--concepts", *kept] if concepts else [])])
    return _merge(links, kept, output_dir, None, density=density, taken_back=None, command=command)


def _phrasings(links: Sequence[Link]) -> dict[str, tuple[str, ...]]:
    """Of every concept of a chain, by its name."""
    found = [split_phrasings(row.concept) for link in links for _, row in link.rows]
    return {phrasings[0]: phrasings for phrasings in found}


def _named(links: Sequence[Link], asked: Sequence[str]) -> list[str]:
    known, found = _phrasings(links), []
    for text in asked:
        words = set(map(fold, split_phrasings(text)))
        names = [name for name, phrasings in known.items() if words <= set(map(fold, phrasings))]
        if not names:
            raise ValueError(
                f"{links[-1].folder} has forgotten {', '.join(known)}; expected one of these, got {text!r}"
            )
        found += names
    return found


def _merge(
    links: Sequence[Link], kept: Sequence[str], output_dir: str | Path, pipeline: DiffusionPipeline | None, **how
) -> Outcome:
    run, values = links[-1], links[-1].options
    if bare := [link.folder for link in links if not link.adapters]:
        raise ValueError(
            f"{bare[0]} left no adapters, which could be left out: expected a run with --lora_rank and no --finish; "
            "forget what shall stay forgotten anew"
        )
    adapters = {file: names for link in links for file, names in link.adapters.items()}
    files = {file: names for file, names in adapters.items() if set(names) & set(kept)}
    if shared := [names for names in files.values() if not set(names) <= set(kept)]:
        raise ValueError(
            f"{', '.join(shared[0])} share one adapter: expected all of them or none; forget them anew with "
            "--adapters each, or one after another"
        )
    rows = [row for link in links for _, row in link.rows if split_phrasings(row.concept)[0] in kept]
    each = "each" if how["density"] is None and all(len(names) == 1 for names in files.values()) else "one"
    own = OWN | shared_by(links) | {"output_dir": str(output_dir), "adapters": each}
    if values["classifier"] and how["taken_back"] is None:
        own["before"] = str(run.folder)  # of the original, which drew most of the pictures
    config = config_from_dict(run_options.ForgetConfig, values | as_options(rows) | own)
    original = pipeline and copy_pipeline(pipeline, checked_family(pipeline).component)
    return run_forgetting(config, original, Merge(run, files, **how))
