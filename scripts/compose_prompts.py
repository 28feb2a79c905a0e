"""Compose the replay prompts that ship for Stable Diffusion: what the model must go on drawing, spread widely.

    python scripts/compose_prompts.py
    python scripts/compose_prompts.py --num_prompts 8000 --seed 1 --output_file my_prompts.txt

A prompt is a subject (perhaps with an adjective, a setting, a light) in a medium (perhaps with an opener, a tag).
Every group of subjects and every medium gets its share, every subject of a group comes equally often, and the order is
shuffled, so that any part of the file is spread like the whole. The same parts and seed give the same file.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sa_diffusers.cli.parse import parse_config


ASSETS_DIR = Path(__file__).parent.parent / "sa_diffusers" / "assets" / "stable_diffusion"

# Vowels that sound like consonants, and the reverse, among words that could come first in a subject.
SOUNDS_LIKE_CONSONANT = ("uni", "uku", "eu", "one", "use")
SOUNDS_LIKE_VOWEL = ("hour", "honest", "heir")


@dataclass
class ComposeConfig:
    num_prompts: int = field(default=6000, metadata={"help": "Number of distinct prompts, one a line."})
    seed: int = field(default=0, metadata={"help": "Decides every choice."})
    parts_file: str = field(default=str(ASSETS_DIR / "prompt_parts.yaml"), metadata={"help": "Word lists, YAML."})
    output_file: str = field(default=str(ASSETS_DIR / "replay_prompts.txt"), metadata={"help": "Text file to write."})


def compose_prompts(parts: dict[str, Any], num_prompts: int, seed: int) -> list[str]:
    """Draw `num_prompts` distinct prompts.

    Args:
        parts: the content of prompt_parts.yaml, which explains itself.
        num_prompts: at least 1; shares are met to within rounding.
        seed: of the one random generator behind all choices.

    Raises:
        RuntimeError: the parts cannot give so many distinct prompts.
    """
    rng = random.Random(seed)
    prompts: dict[str, None] = {}  # a set that keeps the order
    for group, count in _split(num_prompts, parts["subjects"]):
        subjects = _endless_shuffles(group["nouns"] + group["phrases"], rng)
        wanted = len(prompts) + count
        for _ in range(100 * count):
            if len(prompts) == wanted:
                break
            scene = _compose_scene(next(subjects), group, parts["light"][group["light"]], rng)
            prompts[_compose_medium(scene, parts["media"], rng)] = None
        else:
            raise RuntimeError(f"expected parts for {count} distinct prompts on {group['nouns'][0]!r} and its like")
    shuffled = list(prompts)
    rng.shuffle(shuffled)
    return shuffled


def add_article(phrase: str) -> str:
    """`phrase`, a singular noun with its adjectives, after the "a" or "an" that its first sound asks for."""
    word = phrase.lower()
    starts_with_vowel = word[0] in "aeiou" and not word.startswith(SOUNDS_LIKE_CONSONANT)
    return f"{'an' if starts_with_vowel or word.startswith(SOUNDS_LIKE_VOWEL) else 'a'} {phrase}"


def _compose_scene(subject: str, group: dict[str, Any], lights: list[str], rng: random.Random) -> str:
    if subject in group["nouns"]:
        has_adjective = rng.random() < 0.55
        subject = add_article(f"{rng.choice(group['adjectives'])} {subject}" if has_adjective else subject)
    setting = f" {rng.choice(group['settings'])}" if rng.random() < 0.75 else ""
    light = f" {rng.choice(lights)}" if rng.random() < 0.4 else ""
    return subject + setting + light


def _compose_medium(scene: str, media: dict[str, Any], rng: random.Random) -> str:
    medium = rng.choices(list(media.values()), weights=[medium["share"] for medium in media.values()])[0]
    frame = rng.choices(["plain", "opener", "tag", "both"], weights=[15, 50, 15, 20])[0]
    opener = f"{rng.choice(medium['openers'])} of " if frame in ("opener", "both") else ""
    tag = f", {rng.choice(medium['tags'])}" if frame in ("tag", "both") else ""
    return opener + scene + tag


def _split(total: int, groups: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each group with its count; rounding is carried along, so that the counts add up to `total`."""
    shares = sum(group["share"] for group in groups.values())
    passed = 0
    for group in groups.values():
        before = total * passed // shares
        passed += group["share"]
        yield group, total * passed // shares - before


def _endless_shuffles(items: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(items, len(items))


def main() -> None:
    config = parse_config(ComposeConfig, description=__doc__.splitlines()[0])
    parts = yaml.safe_load(Path(config.parts_file).read_text(encoding="utf-8"))
    prompts = compose_prompts(parts, config.num_prompts, config.seed)
    Path(config.output_file).write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts: {config.output_file}")


if __name__ == "__main__":
    main()
