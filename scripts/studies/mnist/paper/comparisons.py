"""Sections of the paper's results: ablations, each digit forgotten, and digit 1 beside the study."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from studies.mnist.paper.bars import differences, digits_table, digits_text, judges
from studies.mnist.paper.figures import OF_CONCEPT, samples_by_digit
from studies.mnist.paper.runs import AUTHORS_BATCH, Run
from studies.mnist.readings import DIGIT, GREY
from studies.mnist.sections import figure, section, table
from studies.mnist.spread import CONCEPT, RETAINED, Values, cells, mean, readings
from studies.mnist.study import Study, draw


KEPT = 0.5  # share of the concept's probability above which it counts as not forgotten
RUINED = 0.1  # loss of the mean retained probability above which the rest counts as ruined
STUDY_ROWS = [["the study", 0.9704, 0.0999, 0.2045, 2.2175]]


def deviation(study: Study, pipeline: Path, digit: int) -> float:
    """Mean of |pixel - GREY| over pictures of a digit: 0 for flat grey, .5 for black and white."""
    images = draw(study.load(pipeline), digit, study.config.num_images, study.config.seed)
    return (images - GREY).abs().mean().item()


def compare_ablations(study: Study, runs: Sequence[Run], folder: Path) -> dict:
    """Forget 0 without this or that.

    Args:
        runs: the two complete ones first, the naive one last.
    """
    original = readings(study, runs[0].metrics, "before")
    afters = {run.title: readings(study, run.metrics, "after") for run in runs if run.metrics}
    keys = (*CONCEPT, *RETAINED)
    deviations = {"original": deviation(study, study.base(), 0)}
    rows = [["original", "–", "–", "–", *cells(original, keys), deviations["original"], "–", "–"]]
    for run in runs:
        row = [run.title, run.authors_lambda, run.settings.ewc_lambda, "yes" if run.replay else "no"]
        if run.metrics is None:
            rows.append([*row, *["diverged"] * 5, run.steps, "–"])
            continue
        deviations[run.title] = deviation(study, run.pipeline, 0)
        values = [*cells(afters[run.title], keys), deviations[run.title]]
        rows.append([*row, *values, run.steps, run.metrics["seconds"]["train"]])
    columns = ["run", "λ (authors)", "λ (here)", "replay", "P(0)", "entropy (nats)", "retained P", "worst retained P"]
    columns += ["distance from grey", "steps", "training s"]
    pipelines = {"original": study.base()} | {run.title: run.pipeline for run in runs if run.pipeline}
    title = "Samples of each run that forgets 0, by the digit asked for"
    drawn = samples_by_digit(study, pipelines, title, OF_CONCEPT)
    caption = f"Each row is a run, each column one latent; the first {OF_CONCEPT} columns ask for the 0."
    return section(
        _ablation_text(original, afters, runs),
        [table("What each part brings (mean ± standard deviation over the classifiers)", columns, rows)],
        [figure(drawn, folder / "paper_ablations.png", caption)],
        {"readings": {"original": original} | afters, "distance_from_grey": deviations},
    )


def _ablation_text(original: Values, afters: Mapping[str, Values], runs: Sequence[Run]) -> list[str]:
    def told(title: str) -> str:
        if title not in afters:
            return "the training diverged"
        concept, others = (mean(afters[title], key) for key in (CONCEPT[0], RETAINED[0]))
        return f"P(0) {concept:.3f}, mean retained P {others:.3f}"

    by_lambda = [f"{run.title}: {told(run.title)}" for run in runs if run.title.startswith("λ ")]
    start = f"P(0) is {mean(original, CONCEPT[0]):.3f} and the mean retained P {mean(original, RETAINED[0]):.3f}"
    return [
        f"λ is in the authors' unit: they sum a loss over a batch of {AUTHORS_BATCH} and this package takes its mean, "
        f"so ewc_lambda is λ / {AUTHORS_BATCH}. Neither has the paper's factor 1/2. The distance from grey is the "
        "mean of |pixel − .5| in pictures of the 0: 0 is flat grey, and no classifier is needed to tell.",
        f"Before, {start}. With replay, {'; '.join(by_lambda)}. Without replay at λ 100: {told('no replay')}; with "
        f"neither replay nor EWC: {told('neither')}.",
        "By default training decodes the latents that a picture was drawn with, and latents of the prior for noise; "
        "the authors decode those that the encoder gives. With these and all else as for λ 100: "
        f"{told('latents of the encoder')}.",
        naive_verdict(runs[-1], original, afters.get(runs[-1].title)),
    ]


def naive_verdict(run: Run, original: Values, naive: Values | None) -> str:
    """In a sentence whether the naive objective failed, as the paper shows in Fig. 2.

    Args:
        original, naive: what is read before and after; None where the training diverged.
    """
    replay = "replay" if run.replay else "no replay"
    lead = f"The naive objective (less of the 0 with nothing in its place, {replay}), run for {run.described}, "
    if naive is None:
        return f"{lead}fails: its first term has no bound, and the training diverges."
    concept = [mean(values, CONCEPT[0]) for values in (original, naive)]
    retained = [mean(values, RETAINED[0]) for values in (original, naive)]
    stays, ruined = concept[1] > KEPT * concept[0], retained[0] - retained[1] > RUINED
    return (
        f"{lead}takes P(0) from {concept[0]:.3f} to {concept[1]:.3f} and the mean retained probability from "
        f"{retained[0]:.3f} to {retained[1]:.3f}: the 0 {'stays' if stays else 'goes'} and the rest is "
        f"{'ruined' if ruined else 'kept'}, so it {'fails' if stays or ruined else 'does not fail by these numbers'}. "
        f"(The 0 stays where more than {KEPT:.0%} of P(0) is left; the rest is ruined where it loses more than "
        f"{RUINED:g}.)"
    )


def compare_digits(study: Study, digits: Mapping[int, tuple[Path, dict]], folder: Path) -> dict:
    """Forget each digit by default."""
    rows, numbers, judged = [], {}, judges(study)
    for digit, (pipeline, metrics) in digits.items():
        sides = {side: readings(study, metrics, side) for side in ("before", "after")}
        distance = deviation(study, pipeline, digit)
        values = [cells(sides[side], [key])[0] for key in (CONCEPT[0], *RETAINED) for side in sides]
        values[2:2] = cells(sides["after"], ("grey_probability", "concept_entropy", "grey_entropy"))
        rows.append([digit, *values, distance])
        reached = differences(digit, *(judged.of(values) for values in sides.values()))
        numbers[str(digit)] = sides | {"distance_from_grey": distance, "bars": reached}
    columns = ["forgotten", "P before", "P after", "P of grey", "entropy after (nats)", "entropy of grey"]
    columns += ["retained P before", "after", "worst retained P before", "after", "distance from grey"]
    title = "Forgetting each digit by default (mean ± standard deviation over the classifiers)"
    found = {digit: numbers[str(digit)]["bars"] for digit in digits}
    pipelines = {f"without {digit}": pipeline for digit, (pipeline, _) in digits.items()}
    drawn = samples_by_digit(study, pipelines, "Samples of models that forgot one digit, by the digit asked for")
    caption = "Each row is a model that forgot one digit, each column one latent."
    return section(
        [_digits_text(numbers), digits_text(found, judged)],
        [table(title, columns, rows), digits_table(found)],
        [figure(drawn, folder / "paper_ten_digits.png", caption)],
        numbers,
    )


def _digits_text(numbers: Mapping[str, Mapping]) -> str:
    after = {digit: mean(found["after"], CONCEPT[0]) for digit, found in numbers.items()}
    lost = {
        digit: mean(found["before"], RETAINED[0]) - mean(found["after"], RETAINED[0])
        for digit, found in numbers.items()
    }
    distance = {digit: found["distance_from_grey"] for digit, found in numbers.items()}
    most, dearest, furthest = (max(values, key=values.get) for values in (after, lost, distance))
    return (
        f"Over the {len(numbers)} digits forgotten by default, the mean probability that is left is at most "
        f"{after[most]:.3f} (digit {most}), the mean retained probability falls by at most {lost[dearest]:.3f} (digit "
        f"{dearest}), and the pictures are at most {distance[furthest]:.3f} from flat grey (digit {furthest})."
    )


def compare_with_study(study: Study, digits: Mapping[int, tuple[Path, dict]]) -> dict:
    """Digit 1 before and after, beside what the study reports."""
    pipeline, metrics = digits[DIGIT]
    before, after = (readings(study, metrics, side) for side in ("before", "after"))
    rows = [*STUDY_ROWS, ["here, mean ± std", *cells(before, CONCEPT), *cells(after, CONCEPT)]]
    for name in before:
        rows.append([f"here, {name}", *(values[name][key] for values in (before, after) for key in CONCEPT)])
    grey = cells(before, ("grey_probability", "grey_entropy"))
    rows.append(["flat grey, mean ± std", "–", "–", *grey])
    columns = ["", f"P({DIGIT}) before", "entropy before", f"P({DIGIT}) after", "entropy after"]
    values = [f"{mean(side, key):.4f}" for side in (before, after) for key in CONCEPT]
    text = (
        f"Forgetting the {DIGIT} by default takes P({DIGIT}) from {values[0]} to {values[2]} and the entropy from "
        f"{values[1]} to {values[3]} nats in the mean over the classifiers; the study reports .9704 to .2045 and "
        f".0999 to 2.2175 for its one classifier. Flat grey gives {grey[0]} and {grey[1]}."
    )
    tables = [table(f"Before and after forgetting the {DIGIT}", columns, rows)]
    return section([text], tables, [], {"before": before, "after": after})
