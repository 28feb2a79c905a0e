"""The prompt lists and surrogates that ship with the package."""

import re
from pathlib import Path

import pytest
import yaml

from scripts.compose_prompts import add_article, compose_prompts


ASSETS = Path(__file__).parents[2] / "sa_diffusers" / "assets"
REPLAY_PROMPTS = (ASSETS / "stable_diffusion" / "replay_prompts.txt").read_text(encoding="utf-8")
PARTS = yaml.safe_load((ASSETS / "stable_diffusion" / "prompt_parts.yaml").read_text(encoding="utf-8"))
SURROGATES = yaml.safe_load((ASSETS / "surrogates.yaml").read_text(encoding="utf-8"))["concepts"]


def contains_phrase(text: str, phrase: str) -> bool:
    return re.search(rf"\b{re.escape(phrase.lower())}\b", text.lower()) is not None


def test_shipped_replay_prompts_are_what_the_script_composes():
    assert "".join(f"{prompt}\n" for prompt in compose_prompts(PARTS, num_prompts=6000, seed=0)) == REPLAY_PROMPTS


def test_replay_prompts_are_many_distinct_and_plain():
    prompts = REPLAY_PROMPTS.splitlines()
    assert len(prompts) >= 5000
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert prompt == " ".join(prompt.split()), prompt
        assert not set("{}[]|") & set(prompt), prompt
        assert len(prompt.split()) <= 30, prompt  # far from the 77 tokens of the text encoder


def test_every_subject_appears_and_any_part_is_spread_like_the_whole():
    prompts = REPLAY_PROMPTS.splitlines()
    for group in PARTS["subjects"].values():
        for subject in group["nouns"] + group["phrases"]:
            assert contains_phrase(REPLAY_PROMPTS, subject), subject
    photos = [sum("photo" in prompt for prompt in part) / len(part) for part in (prompts[:1000], prompts)]
    assert photos[0] == pytest.approx(photos[1], abs=0.05)


def test_parts_add_up():
    for groups in (PARTS["subjects"], PARTS["media"]):
        assert sum(group["share"] for group in groups.values()) == 100
    for group in PARTS["subjects"].values():
        for words in (group["nouns"], group["phrases"], group["adjectives"], group["settings"]):
            assert len(set(words)) == len(words)


def test_too_few_parts_are_an_error():
    group = {"share": 1, "nouns": ["dog"], "phrases": [], "adjectives": ["old"], "settings": ["at home"], "light": "x"}
    parts = {
        "light": {"x": ["at night"]},
        "subjects": {"pets": group},
        "media": {"photo": {"share": 1, "openers": ["a photo"], "tags": ["blurry"]}},
    }
    assert len(set(compose_prompts(parts, num_prompts=10, seed=0))) == 10
    with pytest.raises(
        RuntimeError, match="33 distinct prompts"
    ):  # 2 adjectives x 2 settings x 2 lights x 4 frames = 32
        compose_prompts(parts, num_prompts=33, seed=0)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("dog", "a"),
        ("old dog", "an"),
        ("unicycle", "a"),
        ("umbrella", "an"),
        ("hourglass", "an"),
        ("Indian pilot", "an"),
    ],
)
def test_add_article(phrase, expected):
    assert add_article(phrase) == f"{expected} {phrase}"


def test_concept_templates():
    templates = (ASSETS / "stable_diffusion" / "concept_templates.txt").read_text(encoding="utf-8").splitlines()
    assert templates[0] == "{}"
    assert len(set(templates)) == len(templates) >= 40
    assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_are_well_formed(name):
    entry = SURROGATES[name]
    phrasings = [phrasing.strip() for phrasing in entry["concept"].split(",")]
    assert set(entry) == {"concept", "surrogate", "kind"}
    assert all(isinstance(value, str) for value in entry.values())
    assert name == name.lower()
    assert name == phrasings[0].lower()
    assert entry["kind"] in ("person", "content", "digit", "ink", "stroke")
    assert not any(contains_phrase(entry["surrogate"], phrasing) for phrasing in phrasings)
    if entry["kind"] in ("digit", "ink", "stroke"):
        assert SURROGATES[entry["surrogate"]]["kind"] == entry["kind"]


@pytest.mark.parametrize(
    "name", [name for name, entry in SURROGATES.items() if entry["kind"] in ("person", "content")]
)
def test_replay_prompts_mention_no_concept_of_stable_diffusion(name):
    for phrasing in SURROGATES[name]["concept"].split(","):
        assert not contains_phrase(REPLAY_PROMPTS, phrasing.strip())
