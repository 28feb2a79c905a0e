"""Attack a forgotten model, the original and a control alike: targets, attacks, pictures, numbers; resumable."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sa_diffusers.attacks import AttackSettings, FoundEmbedding, FoundText, attack_embedding, attack_text, draw_found
from sa_diffusers.attacks.found import Found
from sa_diffusers.attacks.options import FROM_PICTURES, OWN, SEARCHES, AttackConfig
from sa_diffusers.attacks.pictures import FoundPictures, invert
from sa_diffusers.attacks.relearning import FoundAdapter, relearn
from sa_diffusers.attacks.results import Attacked, load_judge, summarise, write_results
from sa_diffusers.attacks.victims import DoesNotFit, check_victims, complete, first_tokens, load_family, roles
from sa_diffusers.attacks.weights import FoundWeights, change_weights
from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import Marker, RunLock, check_foreign, hash_tensors
from sa_diffusers.io.atomic_files import load_tensors, remove_leftovers, save_tensors
from sa_diffusers.io.loading import model_hash, pipeline_hashes
from sa_diffusers.io.processes import say
from sa_diffusers.report.pictures import to_uint8


Result = TypeVar("Result")
# What --all makes: options of each attack by its label.
ALL = {
    "one vector": {"attack": "embedding", "num_tokens": 1}, "four vectors": {"attack": "embedding", "num_tokens": 4},
    "two words": {"attack": "text", "num_tokens": 2},
    **{f"relearned {steps} steps": {"attack": "relearn", "steps": steps, "num_tokens": 1} for steps in (25, 50, 100)},
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
KINDS = {
    "embedding": FoundEmbedding, "text": FoundText, "relearn": FoundAdapter, "quantized": FoundWeights,
    "merged": FoundWeights, **dict.fromkeys(FROM_PICTURES, FoundPictures),
}  # fmt: skip


class AttackRun:
    """One run in one folder; every stage leaves files there and is reused if they are of the same configuration.

    Args:
        config: as `complete` returns it.
        label: of the attack, where several share the folder, its targets, and the pictures before.
    """

    def __init__(self, config: AttackConfig, label: str = ""):
        self.config, self.folder = config, Path(config.output_dir)
        self.label = f"{label.replace(',', '').replace(' ', '-')}-" if label else ""
        self.words = split_phrasings(config.concept)
        self.word = FoundText(self.words[0], [], [])
        self.seconds: dict[str, float] = {}  # by stage
        self.targets = self.target_images = self.target_vae = self.original = None

    def settings(self, restart: int) -> AttackSettings:
        """How a restart searches."""
        given = {field.name: getattr(self.config, field.name) for field in fields(AttackSettings)}
        return AttackSettings(**given | {"seed": derive_seed(self.config.seed, "restart", restart)})

    def attack(self, role: str, model: str, family: Family, hashes: dict[str, str]) -> Attacked:
        """All stages of one model, loaded; the original comes first and draws the targets."""
        if role == "original":
            self.draw_targets(family, hashes)
        targets, own = self._targets_for(family), role.replace(" ", "-")
        before = self.pictures(own, "before", family, hashes, self.word, {"word": self.word.text})
        after, found = [], []
        for restart in range(self.config.restarts):
            key = {
                "attack": self.config.attack, "settings": asdict(self.settings(restart)), "words": list(self.words),
                "allow_concept_words": self.config.allow_concept_words, "templates": self.config.templates,
                "targets": hash_tensors({"targets": targets}), "model": hashes,
            }  # fmt: skip
            key |= {name: getattr(self.config, name) for name, known in OWN.items() if self.config.attack in known}
            key |= {"original": self.original} if self.config.attack == "merged" else {}
            found.append(self._find(family, targets, own, restart, key))
            after.append(self.pictures(own, f"after-{self.label}{restart}", family, hashes, found[-1], {"found": key}))
            if role == "original" and restart == 0:
                say(self._time_left())
        return Attacked(model, before, after, found)

    def pictures(self, own: str, name: str, family: Family, hashes: dict[str, str], found: Found, key: dict) -> Tensor:
        """Drawn by what was found, uint8 [N, 3, H, W]; kept in the model's `own` folder; `key` tells what it was."""

        def compute() -> Tensor:
            return to_uint8(_decode(family, self._draw(family, found, "picture", self.config.num_images)))

        key = self._drawing(hashes, "picture", self.config.num_images) | key
        return self._tensor(f"{own}-{name}", key, self.folder / own / f"{name}.safetensors", compute)

    def _time_left(self) -> str:
        """What is left after the first attack, as if all took as long as it and nothing was there already."""
        attack, pictures = (self.seconds[f"original-{name}-{self.label}0"] for name in ("attack", "after"))
        models = len(roles(self.config))
        others = models * self.config.restarts - 1
        left = others * (attack + pictures) + (models - 1) * pictures
        about = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        return (
            f"attack: the first took {attack:.0f} s and its pictures {pictures:.0f} s; {others} more to come, about "
            f"{about} in all, less what the folder holds already"
        )

    def _drawing(self, hashes: dict[str, str], purpose: str, count: int) -> dict:
        """What pictures depend on besides their prompts' words."""
        names = ("guidance_scale", "num_inference_steps", "sampler", "templates", "seed")
        own = {name: getattr(self.config, name) for name in names}
        return own | {"model": hashes, "purpose": purpose, "count": count}

    def _draw(self, family: Family, found: Found, purpose: str, count: int) -> Tensor:
        config = self.config
        seeds = [derive_seed(config.seed, f"attack {purpose}", index) for index in range(count)]
        settings = config.guidance_scale, config.num_inference_steps, config.sample_batch_size
        return draw_found(family, found, config.templates, seeds, *settings)

    def _tensor(self, stage: str, key: dict, path: Path, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of a stage, kept in a file."""

        def save() -> Tensor:
            tensor = compute().contiguous()
            save_tensors({"tensor": tensor}, path)
            return tensor

        return self._stage(stage, key, save, lambda: load_tensors(path, "tensor")[0]["tensor"])

    def _stage(self, name: str, key: dict, compute: Callable[[], Result], load: Callable[[], Result]) -> Result:
        """A stage's result: loaded if the folder holds it under the same key, else computed."""
        marker = Marker(self.folder, name, key)
        if marker.done(self.config.overwrite):
            result = load()
        else:
            marker.clear()  # the old marker must not vouch for new files if this is interrupted
            start = time.perf_counter()
            result = compute()
            marker.finish(time.perf_counter() - start)
        self.seconds[name] = marker.seconds
        return result

    def draw_targets(self, family: Family, hashes: dict[str, str]) -> None:
        """By the original, before anything else is attacked."""
        count = self.config.num_targets
        key = self._drawing(hashes, "target", count) | {"word": self.word.text}
        path = self.folder / "targets.safetensors"
        self.targets = self._tensor("targets", key, path, lambda: self._draw(family, self.word, "target", count))
        self.target_images, self.target_vae = _decode(family, self.targets), model_hash(family.pipeline.vae)
        self.original = hashes

    def _targets_for(self, family: Family) -> Tensor:
        """The targets in a model's own latent space: as they were drawn, or encoded anew by another autoencoder."""
        if model_hash(family.pipeline.vae) == self.target_vae:
            return self.targets
        parts = self.target_images.split(16)
        return torch.cat([family.encode(part, seeded("attack targets", i)) for i, part in enumerate(parts)])

    def _find(self, family: Family, targets: Tensor, own: str, restart: int, key: dict) -> Found:
        kind = KINDS[self.config.attack]
        suffix = "json" if kind in (FoundText, FoundWeights) else "safetensors"
        path = self.folder / own / f"{self.config.attack}-{self.label}{restart}.{suffix}"

        def compute() -> Found:
            found = self._search(family, targets, restart)
            found.save(path)
            return found

        return self._stage(f"{own}-attack-{self.label}{restart}", key, compute, lambda: kind.load(path))

    def _search(self, family: Family, targets: Tensor, restart: int) -> Found:
        config, attack = self.config, self.config.attack
        known = family, targets, config.templates, self.words, self.settings(restart)
        if attack == "text":
            return attack_text(*known, () if config.allow_concept_words else self.words)
        if attack == "quantized":
            return change_weights(*known, precision=config.precision)
        if attack == "merged":
            return change_weights(*known, original=config.original, share=config.merged_share)
        if attack == "inversion":
            return invert(family, targets, config.num_inference_steps, config.sample_batch_size)
        if attack in FROM_PICTURES:
            strength = config.strength if attack == "image_to_image" else 1.0
            return FoundPictures(targets, attack, "" if config.unnamed else self.words[0], strength)
        return (relearn if attack == "relearn" else attack_embedding)(*known)


def run_attack(config: AttackConfig) -> dict:
    """Attack, judge and write attack.json, attack.md, report.html; the numbers as they stand in attack.json.

    Raises:
        ValueError, ModelLoadError: wrong input, before anything is drawn.
        StageMismatch: the folder holds the result of another configuration.
    """
    check_foreign(Path(config.output_dir), "attack.json")
    config = complete(config)
    models, judge = roles(config), load_judge(config)
    check_victims(config, judge.classifier.config.image_size if judge else None)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    chosen = ALL if config.all else {"": {}}
    attacks = {label: replace(config, all=False, **changes) for label, changes in chosen.items()}
    say(describe_plan(config, attacks, judge))
    for line in _look(attacks, models):
        say(line)
    with RunLock(config.output_dir):
        remove_leftovers(config.output_dir)
        runs, attacked = {label: AttackRun(one, label) for label, one in attacks.items()}, defaultdict(dict)
        for role, model in models.items():
            family = load_family(config, model)
            hashes = pipeline_hashes(family.pipeline)
            for label, run in runs.items():
                say(f"attack{f' ({label})' * bool(label)}: {role} ({model})")
                attacked[label][role] = run.attack(role, model, family, hashes)
        targets = to_uint8(run.target_images)
        results = {label: summarise(one, attacked[label], targets, judge) for label, one in attacks.items()}
        result = {"concept": config.concept, "attacks": results} if config.all else results[""]
        write_results(config, result, attacked, targets)
    return result


def _look(attacks: dict[str, AttackConfig], models: Mapping[str, str]) -> list[str]:
    """Load each model and let it go: a failure of the last one must not come after hours on the first.

    Returns:
        What is to be said of attacks, of which those that do not fit a model are dropped. Raises where none is left.
    """
    said: dict[str, None] = {}
    for model in models.values():
        family = load_family(next(iter(attacks.values())), model)
        for label, config in list(attacks.items()):
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
    count = len(models) * times
    pictures = config.num_targets + config.num_images * (len(models) + count)
    lines = [f"bring {config.concept!r} back by {', '.join(ALL) if config.all else f'--attack {config.attack}'}"]
    lines += [f"  {role}: {model}" for role, model in models.items()]
    lines += [
        f"{count:,} attacks ({len(models)} models x {times})"
        + f"{' of' + ' up to' * config.all} {max(searched, default=0):,} steps, {config.batch_size} targets each"
        * bool(searched),
        f"{pictures:,} pictures: {config.num_targets:,} targets, and {config.num_images:,} of each model before and "
        "after each attack",
        f"  guidance {config.guidance_scale:g}, {config.num_inference_steps} steps of {config.sampler}",
        f"judged by {config.classifier} as {judge.attribute}" if judge else "no classifier: pictures only",
        f"into {Path(config.output_dir).resolve()}; what it holds already is reused",
    ]
    return "\n".join(lines)


def _decode(family: Family, latents: Tensor) -> Tensor:
    return torch.cat([family.decode(part) for part in latents.split(16)])
