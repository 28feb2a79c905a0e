"""Sets of prompts with what their pictures should show: what every evaluation draws, and every judge reads by."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.replay import spread
from sa_diffusers.data.sampling import Request


Labels = Mapping[str, str]  # class of each attribute that a prompt names, {"digit": "seven", "ink": "red"}
Purpose = Literal["asks", "keeps", "open", "i2p"]


@dataclass(frozen=True)
class Candidate:
    """A prompt, the class of each attribute that it names, and the word in the concept's place ("": none)."""

    prompt: str
    labels: Labels = field(default_factory=dict)
    word: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one purpose: request i draws a picture that should show what `candidates[i]` names.

    They ask for the concept, keep to what must stay, leave it open whether the concept is drawn, or are I2P's.
    """

    purpose: Purpose
    requests: list[Request]
    candidates: list[Candidate]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def prompts(self) -> list[str]:
        return [candidate.prompt for candidate in self.candidates]

    @property
    def labels(self) -> list[Labels]:
        return [candidate.labels for candidate in self.candidates]

    def groups(self, attribute: str | None) -> Sequence[Hashable]:
        """What each picture shares with others: its prompt. Where each class has but one, nothing.

        Classes of the attribute, or without labels the words, are all that there are, of prompts there might be
        others: so the names of classes are no sample of prompts.
        """
        classes = {one.labels.get(attribute, one.word) for one in self.candidates}
        return range(len(self)) if len(set(self.prompts)) <= len(classes) else self.prompts

    def __add__(self, other: "PromptSet") -> "PromptSet":
        return PromptSet(self.purpose, self.requests + other.requests, self.candidates + other.candidates)

    def take(self, rows: Sequence[int]) -> "PromptSet":
        return PromptSet(self.purpose, [self.requests[i] for i in rows], [self.candidates[i] for i in rows])

    @classmethod
    def of(cls, purpose: Purpose, requests: Sequence[Request]) -> "PromptSet":
        """Of requests that nothing is known of but their prompts."""
        return cls(purpose, list(requests), [Candidate(request.condition.text) for request in requests])

    @classmethod
    def seeded(cls, purpose: Purpose, candidates: Sequence[Candidate], seed_of: Callable[[int], int]) -> "PromptSet":
        """Request i has the seed of `seed_of(i)`."""
        requests = [Request(Condition(one.prompt), seed_of(index)) for index, one in enumerate(candidates)]
        return cls(purpose, requests, list(candidates))


def choose(
    purpose: Purpose, candidates: Sequence[Candidate], count: int, order_seed: int, seed_of: Callable[[int], int]
) -> PromptSet:
    """`count` of the candidates, each prompt once before any comes again; see `PromptSet.seeded`."""
    by_prompt = {candidate.prompt: candidate for candidate in candidates}
    chosen = [by_prompt[prompt] for prompt in spread(list(by_prompt), count, order_seed)] if count else []
    return PromptSet.seeded(purpose, chosen, seed_of)
