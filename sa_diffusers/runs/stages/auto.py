"""The surrogate chosen by the model: near to the concept in its own predictions, and not the concept."""

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from sa_diffusers import methods
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts.candidates import TRIED, candidates, not_forgotten, tries, vocabulary_of
from sa_diffusers.data.replay import concept_captions, spread
from sa_diffusers.evaluation.judges.nearness import Nearness, shortlist
from sa_diffusers.evaluation.judges.preference import PREFERENCE
from sa_diffusers.io.atomic_files import read_json, write_json
from sa_diffusers.io.processes import process_state, progress_bar
from sa_diffusers.io.stages import Stage
from sa_diffusers.report.pictures import figure, save_contact_sheet
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.fisher import FisherStage, trained_names
from sa_diffusers.runs.stages.samples import DRAWING, drawing_settings


NEAR, FINALISTS = 32, 3  # words that the model predicts for; those kept, of TRIED at most that are looked at
PICTURES, TEMPLATES = 16, 4  # of each, under so many captions
OPEN = math.log(100)  # nats within which a word may be drawn as the concept more than once in a hundred pictures
SAME = 0.25  # of the divergence from nothing in its place, or of a finalist's: what is nearer says the same
TAKEN = 0.1  # share of a word's pictures that may be taken for the concept's


class AutoStage(Stage[list[dict[str, Any]]]):
    """What was found for each concept that leaves it to the model; computed before all keys that hold a surrogate."""

    name, counts_as, shown = "auto", "surrogate", True
    inputs, fields = ("model", "prompts", "templates"), ("guidance_scale", *DRAWING)
    leaves = ("surrogate/auto.json", "surrogate/auto-*.png")

    def content(self, context: RunContext) -> dict:
        said = {name: context.concepts.each(name) for name in ("surrogate", "siblings")}
        fisher = FisherStage().given(context)  # by which finalists are put in order
        said |= {} if fisher is None else {"fisher": fisher.fingerprint, "weights": trained_names(context)}
        return context.computed_in | context.concepts.key | said | {"forgotten": _forgotten(context)}

    def compute(self, context: RunContext) -> list[dict[str, Any]]:
        asked = [i for i, one in enumerate(context.concepts) if tries(one.surrogate)]
        found = [self._choose(context, i) for i in asked]
        if process_state().is_main_process:
            write_json({"choices": found}, context.folder / "surrogate" / "auto.json")
        process_state().wait_for_everyone()
        return self.load(context)  # the same for all processes

    def load(self, context: RunContext) -> list[dict[str, Any]]:
        return read_json(context.folder / "surrogate" / "auto.json", "choices")["choices"]

    def describe(self, context: RunContext) -> str:
        return "what takes the concept's place, by the model's own predictions"

    def _choose(self, context: RunContext, number: int) -> dict[str, Any]:
        """The nearest word, the runners-up, and why others were passed over. Raises ValueError: none is left."""
        concept, family, seed = context.concepts[number], context.family, context.options.seed
        if family.labels is None:
            vocabulary = vocabulary_of(family.pipeline.tokenizer)
            words = candidates(concept, context.concepts, context.prompts, vocabulary)
        else:
            words = [label for label in family.labels if not context.concepts.named_in(label)]
        words = not_forgotten(words, _forgotten(context))
        near = shortlist(family, concept.name, words, NEAR) if family.labels is None else words
        some = [spread(context.templates[number], TEMPLATES, derive_seed(seed, "auto"))]
        asked = [pair for *pair, _ in concept_captions(some, Concepts([concept]), PICTURES, seed)]
        scale = context.options.guidance_scale
        judge = Nearness(family, concept, asked, drawing_settings(context, scale), seed)
        picture = self._save(context, f"{number}-0", judge.latents)
        nothing = judge.nats("")
        nats = {word: judge.nats(word) for word in progress_bar(near, "candidates", "words")}
        order = sorted((word for word in near if nats[word] > max(OPEN, SAME * nothing)), key=nats.get)
        finalists = self._finalists(context, judge, order, number)
        kept = [one for one in finalists if one["passed_over"] is None]
        if not kept:
            raise ValueError(
                f"of {len(words)} words none leads away from {concept.name!r} in this model; pass --surrogate with a "
                "prompt, a folder of images (./pictures), or noise"
            )
        fisher = FisherStage().given(context)
        if fisher is not None:
            weights = {name: fisher.value.tensors[name] for name in trained_names(context)}
            for one in kept:
                one["price"] = judge.price(one["word"], weights)
            kept.sort(key=lambda one: one["price"])
        left_open = sorted((word for word in near if word not in order), key=nats.get)
        return {
            "concept": concept.said,
            "chosen": kept[0]["word"],
            "by": "distance" if fisher is None else "price",
            "picture": picture,
            "words": len(words),
            "compared": len(near),
            "nats_of_nothing": nothing,
            "finalists": kept + [one for one in finalists if one not in kept],
            "leave_it_open": {word: nats[word] for word in left_open},
        }

    def _finalists(self, context: RunContext, judge: Nearness, order: list[str], number: int) -> list[dict[str, Any]]:
        """The nearest words, drawn and looked at, until enough stand the test; one of several that say the same."""
        wanted = max(FINALISTS, tries(context.concepts[number].surrogate))
        found: list[dict[str, Any]] = []
        seen: list[Tensor] = []
        for word in order:
            if len(found) == TRIED or sum(one["passed_over"] is None for one in found) == wanted:
                break
            predicted = judge.predictions(judge.said(word))
            nats = judge.divergence(predicted, judge.own)
            if any(judge.divergence(predicted, other) < SAME * nats for other in seen):
                continue
            seen.append(predicted)
            latents = judge.drawn(judge.said(word))
            taken = judge.taken_for_concept(word, latents)
            said = f"{taken:.0%} of its pictures are taken for the concept's" if taken > TAKEN else None
            picture = self._save(context, f"{number}-{len(seen)}", latents)
            one = {"word": word, "nats": nats, "taken_for_concept": taken, "passed_over": said, "picture": picture}
            found.append(one)
        return found

    @staticmethod
    def _save(context: RunContext, name: str, latents: Tensor) -> str:
        """A small sheet of pictures; its name."""
        if process_state().is_main_process:
            sheet = context.folder / "surrogate" / f"auto-{name}.png"
            save_contact_sheet(context.family.decode(latents[:8]), sheet, columns=4)
        return f"auto-{name}.png"


def check_auto(concepts: Concepts, method: methods.Method, bits: int | None = None) -> None:
    """Raise ValueError where a surrogate is left to the model, and there is nothing to choose or to choose by."""
    if not any(tries(one.surrogate) for one in concepts):
        return
    if not method.favours:
        raise ValueError(f"surrogate auto: {method.name} draws nothing in the concept's place; omit it")
    if bits and any(tries(one.surrogate) > 1 for one in concepts):
        raise ValueError("quantize_base: trials need the whole weights; pass surrogate auto, or omit quantize_base")


def said_of_choice(choice: Mapping[str, Any]) -> str:
    """What was chosen and why, in a few sentences."""
    first, *others = choice["finalists"]
    by = {
        "price": "at the least price by the Fisher",
        "distance": "the nearest that leads away from it",
        "trials": "the best of those that were tried",
    }[choice["by"]]
    then = ", ".join(f"{one['word']!r} ({_reason(one)})" for one in others)
    words, compared, nothing = choice["words"], choice["compared"], choice["nats_of_nothing"]
    return (
        f"In the place of {choice['concept']!r}: {first['word']!r} ({_reason(first)}), {by}, of {words} words of "
        f"which the model compared {compared}; nothing in its place is {nothing:.1f} nats away."
        + (f" Then {then}." if then else "")
    )


def choice_sections(context: RunContext) -> list[dict[str, Any]]:
    """For the page: of each choice what was said, and pictures of the concept and of the finalists."""
    folder, sections = context.folder / "surrogate", []
    for choice in context.value(AutoStage.name) or ():
        sheets = {choice["concept"]: (choice["picture"], "the concept")}
        sheets |= {one["word"]: (one["picture"], _reason(one)) for one in choice["finalists"]}
        shown = [figure({"": Image.open(folder / path)}, word, remark) for word, (path, remark) in sheets.items()]
        open_ones = ", ".join(f"{word} ({nats:.1f})" for word, nats in choice["leave_it_open"].items())
        sections.append({"said": said_of_choice(choice), "figures": shown, "open": open_ones})
    return sections


def _reason(one: Mapping[str, Any]) -> str:
    price = f", price {one['price']:.2g}" if "price" in one else ""
    said = {PREFERENCE: "; tried: preferred {:.0%}", "replay_loss": ", replay loss {:.4f}"}  # of what was measured
    tried = "".join(said[name].format(value) for name, value in one.get("tried", {}).items())
    over = f"; passed over: {one['passed_over']}" if one["passed_over"] else ""
    return f"{one['nats']:.1f} nats{price}{tried}{over}"


def _forgotten(context: RunContext) -> list[str]:
    """The words of what the model had forgotten before."""
    return [record["concept"] for record in context.forgotten]
