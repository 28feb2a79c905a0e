"""Part 2 of the study: forget 0, 1, 2, 3, 4 one after the other, with and without a term for those before.

And the same as the package's own chain of runs, beside the plain one."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from studies.mnist.sections import section, table
from studies.mnist.sequential.figures import save_curves, save_grids, save_matrices
from studies.mnist.sequential.rounds import (
    CHAIN,
    DIGITS,
    IMPROVED,
    PLAIN,
    STUDY_PROBABILITIES,
    WATCHED,
    Round,
    examine,
    forget_in_turn,
    retained,
    stage_names,
)
from studies.mnist.spread import short_names, spread
from studies.mnist.study import Study


STILL_GREY = 0.1  # distance from grey below which a digit counts as grey; that of a drawn digit is about .4


def compute(study: Study, folder: Path) -> dict:
    """Forgets, on first use, one digit after the other in both variants."""
    title = "Forgetting one digit after the other"
    return _part(study, folder, (PLAIN, IMPROVED), title, _method_text())


def compute_chain(study: Study, folder: Path) -> dict:
    """As `compute`, of the plain variant and of a chain of runs."""
    title = "Forgetting one digit after the other, with memory"
    return _part(study, folder, (PLAIN, CHAIN), title, [*_method_text()[1:], _chain_text()])


def _part(study: Study, folder: Path, variants: Sequence[str], title: str, text: list[str]) -> dict:
    prompts = study.folder / "sequential"  # of the plain variant, whichever part runs it first
    pipelines = {variant: forget_in_turn(study, variant, prompts) for variant in variants}
    found = {path: examine(study, path) for paths in pipelines.values() for path in paths}  # the first two are shared
    rounds = {variant: [found[path] for path in paths] for variant, paths in pipelines.items()}
    files = {variant: f"{variant.replace(' ', '_')}.png" for variant in variants}
    figures = [save_grids(study, paths, name, folder / f"grids_{files[name]}") for name, paths in pipelines.items()]
    figures += [save_matrices(own, name, folder / f"matrices_{files[name]}") for name, own in rounds.items()]
    return {"title": title} | section(
        [*text, *_result_text(study, rounds)],
        [_watched_table(study, rounds), _rounds_table(rounds), _grey_table(rounds)],
        [*figures, save_curves(rounds, folder / "curves.png")],
        {variant: [_numbers(study, own) for own in rounds[variant]] for variant in rounds},
    )


def _numbers(study: Study, found: Round) -> dict:
    """A round for study.json: the means over the classifiers, and each classifier's own."""
    parts = {"probabilities": found.probabilities, "entropies": found.entropies, "accuracies": found.accuracies}
    names = short_names(study.classifiers).values()
    return {
        **{key: values.mean(0).tolist() for key, values in parts.items()},
        "distances_from_grey": found.distances.tolist(),
        "by_classifier": {
            name: {key: values[index].tolist() for key, values in parts.items()} for index, name in enumerate(names)
        },
    }


def _spread(values: Tensor) -> str:
    return spread(values.tolist())


def _watched_table(study: Study, rounds: Mapping[str, Sequence[Round]]) -> dict:
    first = next(iter(short_names(study.classifiers).values()))
    rows: list[list] = [["the study", *STUDY_PROBABILITIES]]
    for variant, own in rounds.items():
        rows.append([f"{variant}, {first}", *(found.own[0, WATCHED].item() for found in own)])
        rows.append([f"{variant}, mean ± std", *(_spread(found.own[:, WATCHED]) for found in own)])
    return table(f"P({WATCHED}) where the {WATCHED} is asked for", ["", *stage_names()], rows)


def _rounds_table(rounds: Mapping[str, Sequence[Round]]) -> dict:
    columns = ["variant", "", "retained accuracy", "retained P", "worst retained P", "forgotten P"]
    columns += ["forgotten entropy (nats)", "largest distance from grey"]
    rows: list[list] = []
    for variant, own in rounds.items():
        for number, (stage, found) in enumerate(zip(stage_names(), own, strict=True)):
            kept, gone = retained(number, found.own.shape[1]), list(DIGITS[:number])
            row = [variant, stage, _spread(found.accuracies[:, kept].mean(1)), _spread(found.own[:, kept].mean(1))]
            row.append(_spread(found.own[:, kept].min(1).values))
            if gone:
                row += [_spread(found.own[:, gone].mean(1)), _spread(found.entropies[:, gone].mean(1))]
                row.append(found.distances[gone].max().item())
            rows.append(row + ["–"] * (len(columns) - len(row)))
    return table("Every round (mean ± standard deviation over the classifiers)", columns, rows)


def _grey_table(rounds: Mapping[str, Sequence[Round]]) -> dict:
    """Each forgotten digit: the original, right after its own round, and after the last."""
    rows = []
    for variant, own in rounds.items():
        for number, digit in enumerate(DIGITS, 1):
            stages = (own[0], own[number], own[-1])
            distances = [found.distances[digit].item() for found in stages]
            rows.append([variant, digit, *distances, *(_spread(found.own[:, digit]) for found in stages[1:])])
    columns = ["variant", "digit", "distance, original", "after its round", "after the last"]
    columns += ["P after its round", "P after the last"]
    return table("Do forgotten digits stay grey? (distance from grey)", columns, rows)


def _method_text() -> list[str]:
    return [
        f"Digits {', '.join(map(str, DIGITS))} are forgotten in this order. Each round starts from the last round's "
        "model, with a new Fisher, anchor and frozen copy. In the plain variant the Fisher covers the digits not yet "
        "forgotten, the one about to go among them, and the others of these are replayed; nothing is done for digits "
        "forgotten earlier. The improved variant also replays those, as the grey that the model draws for them, and "
        "its Fisher covers them. The first round is the same in both.",
        "The distance from grey is the mean of |pixel − .5| over the pictures of a digit: 0 is flat grey; a digit "
        f"counts as grey below {STILL_GREY}.",
    ]


def _chain_text() -> str:
    return (
        "With memory, each request is a run with --after of the last one, as sa_diffusers.forget_sequence makes it: "
        f"the original forgets all of the digits {', '.join(map(str, DIGITS))} that have come by then, in equal "
        "shares, on the samples and the Fisher of the first run, and none of them is replayed. Plain is that variant "
        "of the part before: each round starts from the last one's model."
    )


def _result_text(study: Study, rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    watched = {
        variant: " ".join(f"{found.own[:, WATCHED].mean():.4f}" for found in own) for variant, own in rounds.items()
    }
    reported = " ".join(f"{value:.4f}" for value in STUDY_PROBABILITIES)
    sentences = [
        f"P({WATCHED}) in the mean over {len(study.classifiers)} classifier(s), from the original to the last round: "
        + "; ".join(f"{variant} {values}" for variant, values in watched.items())
        + f". The study reports {reported} for its one classifier."
    ]
    return sentences + [_variant_text(variant, own) for variant, own in rounds.items()]


def _variant_text(variant: str, own: Sequence[Round]) -> str:
    """Whether forgotten digits stayed grey, and what became of the retained ones, in two sentences."""
    kept = retained(len(DIGITS), own[-1].own.shape[1])
    start, end = (found.accuracies[:, kept].mean().item() for found in (own[0], own[-1]))
    earlier = DIGITS[:-1]
    last = {digit: own[-1].distances[digit].item() for digit in earlier}
    right_after = [own[number].distances[digit].item() for number, digit in enumerate(earlier, 1)]
    back = [digit for digit, value in last.items() if value >= STILL_GREY]
    drift = (
        f"the mean distance from grey of digits forgotten earlier is {statistics.fmean(right_after):.3f} after their "
        f"own round and {statistics.fmean(last.values()):.3f} after the last"
    )
    told = f"not grey at the end: {', '.join(map(str, back))}" if back else "all of them are grey at the end"
    return (
        f"In the {variant} variant {drift}; {told}. Pictures of the digits {', '.join(map(str, kept))}, which are "
        f"retained throughout, are read right in {start:.1%} before and {end:.1%} after the last round."
    )
