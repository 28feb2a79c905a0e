"""The surrogate that the model chooses: of which words, by what, and that a run keeps to it."""

import json
from dataclasses import replace

import pytest
import torch
from cheap_runs import CHEAP, PROMPTS, context_of
from torch.testing import assert_close

from sa_diffusers import Forget, forget, methods
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.data.concepts.candidates import candidates, not_forgotten
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.sampling import SamplingSettings
from sa_diffusers.evaluation.judges.nearness import Nearness, shortlist
from sa_diffusers.evaluation.judges.preference import PREFERENCE
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.io.stages import Artifact
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.auto import AutoStage, check_auto
from sa_diffusers.runs.stages.fisher import FisherStage
from sa_diffusers.runs.surrogates.settling import best_of


def test_words_that_go_with_the_concept_or_are_forgotten_are_no_candidates():
    concepts = Concepts([find_concept("seven, 7", "auto"), find_concept("blue", "auto")])
    found = candidates(concepts[0], concepts, ["a red seven", "a green nine", "two dogs"], ["seven", "nine", "vase"])
    assert {"zero", "green", "a man", "dogs", "vase"} <= set(found) and len(found) == len(set(found))
    assert found[0] == "zero"  # siblings come first
    assert not {"seven", "7", "red", "blue"} & set(found)
    assert not {"nine", "a man"} & set(not_forgotten(found, ["nine, 9; man"]))


@pytest.fixture(scope="module")
def telling(tiny_pipeline):
    """A pipeline for which words make a difference: of random weights, those that read them are large."""
    pipeline = tiny_pipeline()
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if "attn2" in name:
                weight.mul_(8)
    return pipeline


@pytest.fixture(scope="module")
def nearness(telling):
    asked = [("a seven", "a {}"), ("a red 7", "a red {}"), ("a seven", "a {}")]
    settings = SamplingSettings(2.0, 2, 4)
    return Nearness(get_family(telling), find_concept("seven, 7", "auto"), asked, settings, seed=0)


def test_divergence_is_of_one_picture_after_the_other(nearness):
    """Against predictions one by one."""
    loss, (terms, weights), family = nearness.family.loss, nearness.family.loss.divergence_terms(6), nearness.family
    assert nearness.divergence(nearness.predictions(nearness.captions), nearness.own) == 0
    first, second = (nearness.predictions(prompts) for prompts in (nearness.captions, nearness.said("nine")))
    assert first.shape == (6, 3, 4 * 8 * 8)
    expected = (first.double() - second.double()).square().flatten(2).sum(2).sum(0).mean()
    assert nearness.nats("nine") == pytest.approx(float(expected), rel=1e-5) and expected > 0
    one = nearness.predictions(nearness.captions[:1])
    assert_close(one[0, 0], first[0, 0], rtol=1e-4, atol=1e-5)
    assert (weights > 0).all() and len(terms) == 6 and loss is family.loss


def test_price_is_what_ewc_charges_for_the_step_that_closes_the_gap(nearness):
    module = nearness.family.module
    names = [name for name, _ in module.named_parameters() if "attn2.to_v" in name]
    even = {name: torch.ones_like(module.get_parameter(name)) for name in names}
    price = nearness.price("nine", even)
    twice = nearness.price("nine", {name: 2 * fisher for name, fisher in even.items()})
    assert price > 0 and twice == pytest.approx(2 * price, rel=1e-6)


def test_what_was_chosen_by_one_fisher_is_not_taken_for_anothers(telling, tmp_path, monkeypatch):
    keys = []
    for name, scope in ((None, "full"), ("a", "full"), ("b", "full"), ("b", "xattn")):
        context = context_of(get_family(telling), tmp_path, surrogate="auto", fisher=name, train_scope=scope)
        context.artifacts |= {part: Artifact(None, part) for part in ("prompts", "templates")}
        monkeypatch.setattr(FisherStage, "given", lambda _, c: c.options.fisher and Artifact(None, c.options.fisher))
        keys.append(fingerprint(AutoStage().key(context)))
    assert len(set(keys)) == 4


def test_shortlist_takes_what_is_near_and_what_tells(nearness):
    words = ["nine", "six", "red", "green", "a", "on"]
    assert shortlist(nearness.family, "seven", words, 9) == words
    some = shortlist(nearness.family, "seven", words, 3)
    assert len(some) == 3 and set(some) < set(words)


# What a word shows, and the nats by which it is told from what does not show it; any other word shows itself.
PERSON, MALE, FEMALE, YOUNG, PAINTED = ("person", 12), ("male", 4), ("female", 4), ("young", 30), ("paint", 12)
SHOWN = {
    "brad pitt": (PERSON, MALE, ("brad pitt", 20)), "tom cruise": (PERSON, MALE, ("tom cruise", 20)),
    "a person": (PERSON,), "a man": (PERSON, MALE), "a woman": (PERSON, FEMALE), "a boy": (PERSON, MALE, YOUNG),
    "a girl": (PERSON, FEMALE, YOUNG), "a child": (PERSON, YOUNG), "": (),
    "a van gogh": (PAINTED, ("van gogh", 20)), "a monet": (PAINTED, ("monet", 20)), "a painting": (PAINTED,),
}  # fmt: skip


@pytest.fixture
def choose(telling, monkeypatch, tmp_path):
    """What is chosen by a model, and an encoder, in which what words show adds up: squared distances are nats."""
    places: dict[str, int] = {}

    def read(words):
        found = torch.zeros(len(words), 400)
        for row, word in zip(found, words, strict=True):
            for name, nats in SHOWN.get(word.lower(), [(part, 60) for part in word.split()]):
                row[places.setdefault(name, len(places))] = nats**0.5
        return found

    def choose(concept, siblings):
        family = get_family(telling)
        monkeypatch.setattr(family, "encode_prompts", lambda words: read(words))
        monkeypatch.setattr(family, "text_parts", lambda vectors: {"tokens": vectors[:, None]})
        monkeypatch.setattr(Nearness, "predictions", lambda _, prompts: read(prompts)[None])
        monkeypatch.setattr(Nearness, "drawn", lambda _, prompts: torch.zeros(len(prompts), 4, 8, 8))
        monkeypatch.setattr(Nearness, "taken_for_concept", lambda *_: 0.0)
        context = context_of(family, tmp_path, concept, "auto")
        concepts = Concepts([find_concept(concept, "auto", siblings)])
        context.inputs = replace(context.inputs, concepts=concepts)
        (choice,) = AutoStage().compute(context)
        assert choice["finalists"][0]["nats"] < choice["nats_of_nothing"]
        return choice["chosen"]

    return choose


def test_a_person_gives_way_to_a_person_and_a_style_to_its_absence(choose):
    """And to no other of the kind: what the two share is nearer than what each has of its own."""
    assert choose("Brad Pitt", "Tom Cruise") == "a man"
    assert choose("a Van Gogh", "a Monet") == "a painting"


GIVEN = CHEAP | {"method": "uce", "ewc_lambda": 0.0, "sample_batch_size": 48, "progress": False}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "replay.txt"
    path.write_text("\n".join(PROMPTS))
    return {"replay_prompts": str(path), "concept_templates": "bundled/stable_diffusion/bare_concept.txt"}


@pytest.fixture(scope="module")
def run(few_pictures, telling, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "run"
    rows = [Forget("seven, 7", "auto"), Forget("red", "green")]
    return folder, rows, forget(telling, rows, output_dir=folder, **GIVEN, **prompts)


@pytest.mark.slow
def test_what_was_chosen_is_what_the_run_says(run):
    folder, _, forgotten = run
    (choice,) = json.loads((folder / "surrogate" / "auto.json").read_text())["choices"]
    first, *others = choice["finalists"]
    assert choice["concept"] == "seven, 7" and choice["chosen"] == first["word"]
    kept = [one["nats"] for one in choice["finalists"] if one["passed_over"] is None]
    assert kept == sorted(kept) and kept[0] > 4.6
    assert all(nats <= max(4.61, choice["nats_of_nothing"] / 4) for nats in choice["leave_it_open"].values())
    values = read_yaml(str(folder / "config.yaml"))
    assert (values["concept"], values["surrogate"]) == ("seven, 7; red", f"{first['word']}; green")
    assert (
        forgotten.metrics["surrogate"] == f"{first['word']}; green" and forgotten.metrics["seconds"]["surrogate"] > 0
    )
    assert {one["picture"] for one in choice["finalists"]} <= {path.name for path in folder.glob("surrogate/*.png")}


@pytest.mark.slow
def test_the_same_call_goes_on_with_the_same_choice(run, telling, prompts):
    folder, rows, _ = run
    before = (folder / "surrogate" / "auto.json").stat().st_mtime_ns
    again = forget(telling, rows, output_dir=folder, **GIVEN, **prompts)
    assert (folder / "surrogate" / "auto.json").stat().st_mtime_ns == before
    assert {"edit", "after"} <= set(again.metrics["seconds"]["reused"])


def test_where_nothing_can_be_chosen_it_is_said(prompts, tiny_pipeline, tmp_path):
    away = next(name for name, one in methods.registry().items() if not one.favours and "text" in one.requires)
    with pytest.raises(ValueError, match=f"{away} draws nothing in the concept's place"):
        read_inputs(ForgetConfig(concept="seven", surrogate="auto", method=away, **prompts))
    with pytest.raises(ValueError, match="trials need the whole weights"):
        check_auto(Concepts([find_concept("seven", "auto:3")]), methods.get(methods.DEFAULT), bits=8)
    with pytest.raises(ValueError, match="none leads away from 'seven'"):  # words make no difference to it
        forget(tiny_pipeline(), "seven", "auto", output_dir=tmp_path / "run", **GIVEN, **prompts)


@pytest.mark.slow
def test_several_are_tried_and_the_best_is_kept(few_pictures, telling, prompts, tmp_path):
    before = {name: weight.clone() for name, weight in telling.unet.state_dict().items()}
    given = CHEAP | {"sample_batch_size": 48, "progress": False, "output_dir": tmp_path} | prompts
    events: list[dict] = []
    forgotten = forget(telling, "seven, 7", "auto:2", callback=events.append, **given)
    assert_close(telling.unet.state_dict(), before, rtol=0, atol=0)
    ((concept, tried),) = json.loads((tmp_path / "surrogate" / "trials.json").read_text()).items()
    (choice,) = json.loads((tmp_path / "surrogate" / "auto.json").read_text())["choices"]
    nearest = [one["word"] for one in choice["finalists"] if one["passed_over"] is None]
    assert concept == "seven, 7" and list(tried) == nearest[:2]
    assert forgotten.metrics["surrogate"] == best_of(tried) and not list(tmp_path.glob("surrogate/trial-*"))
    assert any("the best of those that were tried" in event.get("text", "") for event in events)
    # The trials left the run what it was: by the same word alone it is the same.
    alone = forget(telling, "seven, 7", best_of(tried), **given | {"output_dir": tmp_path / "alone"})
    assert_close(alone.unet.state_dict(), forgotten.unet.state_dict(), rtol=0, atol=0)
    made = (tmp_path / "surrogate" / "trials.json").stat().st_mtime_ns
    again = forget(telling, "seven, 7", "auto:2", **given)
    assert (tmp_path / "surrogate" / "trials.json").stat().st_mtime_ns == made
    assert {"samples", "fisher", "train", "after"} <= set(again.metrics["seconds"]["reused"])


def test_the_best_changes_least_of_those_that_forget_as_much():
    found = {"nine": (0.3, 1.0), "six": (0.02, 1.3), "two": (0.06, 1.2)}
    tried = {word: {PREFERENCE: left, "replay_loss": loss} for word, (left, loss) in found.items()}
    assert best_of(tried) == "two"
    assert best_of({"nine": {PREFERENCE: 0.2}, "six": {PREFERENCE: 0.1}}) == "six"
