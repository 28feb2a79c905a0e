"""Digits forgotten one after the other: the models of each round, and what they draw."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.evaluation.judges.classifier import entropies
from sa_diffusers.io.atomic_files import atomic_path
from studies.mnist.paper.runs import default_run
from studies.mnist.readings import GREY
from studies.mnist.study import Study, draw, read


DIGITS = (0, 1, 2, 3, 4)  # in the order in which they are forgotten
PLAIN, IMPROVED, CHAIN = "plain", "improved", "with memory"
WATCHED = 9  # the retained digit whose probability the study reports
STUDY_PROBABILITIES = (0.9133, 0.9252, 0.9315, 0.9306, 0.9270, 0.9193)  # of WATCHED: the original, then each round


@dataclass(frozen=True)
class Round:
    """What a model draws when asked for each of C digits, as J classifiers read it.

    Attributes:
        probabilities: mean over the pictures, [J, C, C]: classifier, digit asked for, digit read.
        entropies: mean entropy in nats, [J, C].
        accuracies: share of the pictures that are read as what was asked for, [J, C].
        distances: mean of |pixel - GREY|, [C]: 0 is flat grey.
    """

    probabilities: Tensor
    entropies: Tensor
    accuracies: Tensor
    distances: Tensor

    @property
    def own(self) -> Tensor:
        """The probability of the digit that was asked for, [J, C]."""
        return self.probabilities.diagonal(dim1=1, dim2=2)


def forget_in_turn(study: Study, variant: str, folder: Path) -> list[Path]:
    """The pipelines: the original, and that after each round. Each round starts from the last one's pipeline, but for
    CHAIN, whose rounds go on as the package does (`after`): from the original, with all that was forgotten by then.

    Args:
        variant: PLAIN, IMPROVED or CHAIN. The improved one replays every other digit, so also its own grey pictures of
            those already forgotten; the plain one has nothing for these, neither in the replay nor in the Fisher.
        folder: where the prompts of the plain variant are kept.
    """
    labels = study.load(study.base()).labels
    pipelines = [study.base(), default_run(study, DIGITS[0])[0]]  # nothing was forgotten before the first round
    for number, digit in enumerate(DIGITS[1:], 2):
        options = {"after": str(pipelines[-1].parent)} if variant == CHAIN else {"model": pipelines[-1]}
        if variant == PLAIN:
            prompts = folder / f"remaining_{number}.txt"
            remaining = [labels[index] for index in retained(number - 1, len(labels))]
            with atomic_path(prompts) as temporary:
                temporary.write_text("\n".join(remaining) + "\n")
            options["replay_prompts"] = str(prompts)
        name = f"sequential_{variant.replace(' ', '_')}_{number}_forget_{digit}"
        pipelines.append(study.forget(name, digit, **options)[0])
    return pipelines


def examine(study: Study, path: Path) -> Round:
    """Draw every digit from shared latents and let every classifier read the pictures."""
    pipeline, config = study.load(path), study.config
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for label in range(len(pipeline.labels)):
        images = draw(pipeline, label, config.num_images, config.seed)
        read_by = [read(classifier, images) for classifier in study.classifiers.values()]
        rows.append(
            (
                torch.stack([p.mean(0) for p in read_by]),
                torch.stack([entropies(p).mean() for p in read_by]),
                torch.stack([(p.argmax(1) == label).float().mean() for p in read_by]),
                (images - GREY).abs().mean(),
            )
        )
    *read_parts, distances = zip(*rows, strict=True)
    return Round(*(torch.stack(part, 1) for part in read_parts), torch.stack(distances))


def retained(number: int, count: int) -> list[int]:
    """The digits of `count` that are still retained after round `number`, 0 for the original."""
    return [digit for digit in range(count) if digit not in DIGITS[:number]]


def stage_names() -> list[str]:
    """Of the original, and of the model after each round."""
    first, *others = DIGITS
    return ["original", f"without {first}", *(f"without {first}–{digit}" for digit in others)]
