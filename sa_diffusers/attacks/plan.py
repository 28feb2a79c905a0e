"""What an attack command is about to do: each attack's options, whether it fits, and how much work it is."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sa_diffusers.attacks.options import SEARCHES, AttackConfig
from sa_diffusers.attacks.victims import DoesNotFit, first_tokens, load_family, meets, roles
from sa_diffusers.data.concepts.candidates import WORDS
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.io.processes import say


RELEARNED, ON_OTHERS = "relearned", "relearned on something else"
# What --all makes: options of each attack by its label.
ALL = {
    "one vector": {"attack": "embedding", "num_tokens": 1}, "four vectors": {"attack": "embedding", "num_tokens": 4},
    "two words": {"attack": "text", "num_tokens": 2},
    "two real words": {"attack": "text", "num_tokens": 2, "word_list": WORDS},
    **{label: {"attack": "relearn", "steps": 100, "num_tokens": 1} for label in (RELEARNED, ON_OTHERS)},
    **{f"in {precision}": {"attack": "quantized", "precision": precision} for precision in ("fp8", "int8", "int4")},
    "merged with half of the original": {"attack": "merged"},
    "inversion": {"attack": "inversion"},
    **{f"image to image at {s}": {"attack": "image_to_image", "strength": s} for s in (0.5, 0.7, 0.9)},
    **{
        f"image to image at {s}, unnamed": {"attack": "image_to_image", "strength": s, "unnamed": True}
        for s in (0.5, 0.7)
    },
    "inpainting": {"attack": "inpainting"},
    "inpainting, unnamed": {"attack": "inpainting", "unnamed": True},
}  # fmt: skip


def attacks_of(config: AttackConfig) -> dict[str, AttackConfig]:
    """Each attack by its label, "" where there is one alone; without one on something else where none is known."""
    if not config.all:
        return {"": config}
    attacks, prompts = {}, config.relearn_prompts
    for label, changes in ALL.items():
        if label == ON_OTHERS and not prompts:
            say(f"without {label}: the pipeline says no words that took the concept's place; pass --relearn_prompts")
            continue
        attacks[label] = replace(config, all=False, relearn_prompts=prompts * (label == ON_OTHERS), **changes)
    return attacks


def look(attacks: dict[str, AttackConfig], models: Mapping[str, str]) -> list[str]:
    """Load each model and let it go: a failure of the last one must not come after hours on the first.

    Returns:
        What is to be said of attacks, of which those that do not fit a model are dropped. Raises where none is left.
    """
    said: dict[str, None] = {}
    for role, model in models.items():
        family = load_family(next(iter(attacks.values())), model)
        for label, config in list(attacks.items()):
            if not meets(config, role):
                said[f"{label or config.attack}: not of {model}, whose weights were trained apart"] = None
                continue
            try:
                said[first_tokens(config, model, family)] = None
            except DoesNotFit as error:
                if len(attacks) == 1:
                    raise
                del attacks[label]
                said[f"without {label}: {error}"] = None
    return list(said)


def describe_plan(config: AttackConfig, attacks: Mapping[str, AttackConfig], judge: ClassifierJudge | None) -> str:
    """What is about to be done, for the terminal."""
    models, searched = roles(config), [one.steps for one in attacks.values() if one.attack in SEARCHES]
    times = sum(one.restarts for one in attacks.values())
    made = [one for one in attacks.values() for role in models if meets(one, role)]
    count, looks = sum(one.restarts for one in made), sum(one.restarts * len(one.looks) for one in made)
    pictures = config.num_targets + config.num_images * (len(models) + count + looks)
    lines = [f"bring {config.concept!r} back by {', '.join(attacks) if config.all else f'--attack {config.attack}'}"]
    lines += [f"  {role}: {model}" for role, model in models.items()]
    lines += [
        f"{count:,} attacks"
        + f" ({len(models)} models x {times})" * (count == len(models) * times)
        + f"{' of' + ' up to' * config.all} {max(searched, default=0):,} steps, {config.batch_size} targets each"
        * bool(searched),
        f"{pictures:,} pictures: {config.num_targets:,} targets, and {config.num_images:,} of each model before and "
        "after each attack" + f", and {looks} times on the way" * bool(looks),
        f"  guidance {config.guidance_scale:g}, {config.num_inference_steps} steps of {config.sampler}",
        f"judged by {config.classifier} as {judge.attribute}" if judge else "no classifier: pictures only",
        f"into {Path(config.output_dir).resolve()}; what it holds already is reused",
    ]
    return "\n".join(lines)
