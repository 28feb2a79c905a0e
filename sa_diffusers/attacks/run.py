"""Attack a forgotten model, the original and a control alike: targets, attacks, pictures, numbers; resumable."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sa_diffusers.attacks import AttackSettings, FoundEmbedding, FoundText, attack_embedding, attack_text, draw_found
from sa_diffusers.attacks.found import Found
from sa_diffusers.attacks.options import FROM_PICTURES, OWN, AttackConfig
from sa_diffusers.attacks.pictures import FoundPictures, invert
from sa_diffusers.attacks.plan import attacks_of, describe_plan, look
from sa_diffusers.attacks.relearning import FoundAdapter, relearn
from sa_diffusers.attacks.results import Attacked, summarise, write_results
from sa_diffusers.attacks.victims import (
    check_victims,
    complete,
    forbidden,
    listed_words,
    load_family,
    meets,
    roles,
)
from sa_diffusers.attacks.weights import FoundWeights, change_weights
from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import Marker, check_foreign, hash_tensors, run_lock
from sa_diffusers.io.atomic_files import load_tensors, remove_leftovers, save_tensors
from sa_diffusers.io.loading import model_hash, pipeline_hashes
from sa_diffusers.io.processes import say
from sa_diffusers.report.pictures import to_uint8


Result = TypeVar("Result")
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
        self.listed = listed_words(config)
        self.word = FoundText(self.words[0], [], [])
        self.seconds: dict[str, float] = {}  # by stage
        self.targets = self.target_images = self.target_vae = self.original = None
        self.others = self.other_images = None  # what relearn trains on in place of targets
        prompts = config.relearn_prompts
        self.other_prompts = [prompts[i % len(prompts)] for i in range(config.relearn_pictures)] if prompts else []

    def settings(self, restart: int) -> AttackSettings:
        """How a restart searches."""
        given = {field.name: getattr(self.config, field.name) for field in fields(AttackSettings)}
        return AttackSettings(**given | {"seed": derive_seed(self.config.seed, "restart", restart)})

    def attack(self, role: str, model: str, family: Family, hashes: dict[str, str]) -> Attacked:
        """All stages of one model, loaded; the original comes first and draws the targets."""
        if role == "original":
            self.draw_targets(family, hashes)
        targets, own = self._own(family, self.targets, self.target_images), role.replace(" ", "-")
        others = self._own(family, self.others, self.other_images) if self.other_prompts else None
        before = self.pictures(own, "before", family, hashes, self.word, {"word": self.word.text})
        after, found, on_the_way = [], [], []
        for restart in range(self.config.restarts):
            key = {
                "attack": self.config.attack, "settings": asdict(self.settings(restart)), "words": list(self.words),
                "allow_concept_words": self.config.allow_concept_words, "templates": self.config.templates,
                "targets": hash_tensors({"targets": targets}), "model": hashes,
            }  # fmt: skip
            key |= {name: getattr(self.config, name) for name, known in OWN.items() if self.config.attack in known}
            key |= {"word_list": self.listed} if key.pop("word_list", None) else {}
            key |= {"original": self.original} if self.config.attack == "merged" else {}
            if self.config.attack == "relearn" and self.config.relearn_every:
                key["relearn_every"] = self.config.relearn_every
            if others is not None:
                key |= {"others": hash_tensors({"others": others}), "relearn_prompts": self.config.relearn_prompts}
            found.append(self._find(family, targets, others, own, restart, key))
            name = f"after-{self.label}{restart}"
            after.append(self.pictures(own, name, family, hashes, found[-1], {"found": key}))
            on_the_way.append({
                n: self.pictures(
                    own, f"{name}-{n}-steps", family, hashes, found[-1].after(n), {"found": key, "steps": n}
                )
                for n in self.config.looks
            })  # fmt: skip
            if role == "original" and restart == 0:
                say(self._time_left())
        return Attacked(model, before, after, found, on_the_way)

    def pictures(self, own: str, name: str, family: Family, hashes: dict[str, str], found: Found, key: dict) -> Tensor:
        """Drawn by what was found, uint8 [N, 3, H, W]; kept in the model's `own` folder; `key` tells what it was."""

        def compute() -> Tensor:
            return to_uint8(_decode(family, self._draw(family, found, "picture", self.config.num_images)))

        key = self._drawing(hashes, "picture", self.config.num_images) | key
        return self._tensor(f"{own}-{name}", key, self.folder / own / f"{name}.safetensors", compute)

    def _time_left(self) -> str:
        """What is left after the first attack, as if all took as long as it and nothing was there already."""
        attack = self.seconds[f"original-attack-{self.label}0"]
        drawn = [seconds for name, seconds in self.seconds.items() if name.startswith(f"original-after-{self.label}0")]
        pictures, before = sum(drawn), drawn[0]
        models = sum(meets(self.config, role) for role in roles(self.config))
        others = models * self.config.restarts - 1
        left = others * (attack + pictures) + (models - 1) * before
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
        if not self.other_prompts:
            return
        key = self._drawing(hashes, "other", len(self.other_prompts)) | {"prompts": self.other_prompts}
        path = self.folder / "others.safetensors"
        self.others = self._tensor("others", key, path, lambda: self._draw_others(family))
        self.other_images = _decode(family, self.others)

    def _draw_others(self, family: Family) -> Tensor:
        config, count, size = self.config, len(self.other_prompts), self.config.sample_batch_size
        seeds, asked = [derive_seed(config.seed, "attack other", i) for i in range(count)], self.other_prompts
        conditions, settings = list(map(Condition, asked)), (config.guidance_scale, config.num_inference_steps)
        batches = [slice(start, start + size) for start in range(0, count, size)]
        return torch.cat([family.draw(conditions[batch], seeds[batch], *settings) for batch in batches])

    def _own(self, family: Family, latents: Tensor, images: Tensor) -> Tensor:
        """Latents in a model's own space: as they were drawn, or their images encoded anew by another autoencoder."""
        if model_hash(family.pipeline.vae) == self.target_vae:
            return latents
        parts = images.split(16)
        return torch.cat([family.encode(part, seeded("attack targets", i)) for i, part in enumerate(parts)])

    def _find(
        self, family: Family, targets: Tensor, others: Tensor | None, own: str, restart: int, key: dict
    ) -> Found:
        kind = KINDS[self.config.attack]
        suffix = "json" if kind in (FoundText, FoundWeights) else "safetensors"
        path = self.folder / own / f"{self.config.attack}-{self.label}{restart}.{suffix}"

        def compute() -> Found:
            found = self._search(family, targets, others, restart)
            found.save(path)
            return found

        return self._stage(f"{own}-attack-{self.label}{restart}", key, compute, lambda: kind.load(path))

    def _search(self, family: Family, targets: Tensor, others: Tensor | None, restart: int) -> Found:
        config, attack = self.config, self.config.attack
        known = family, targets, config.templates, self.words, self.settings(restart)
        if attack == "text":
            return attack_text(*known, forbidden(config), self.listed)
        if attack == "quantized":
            return change_weights(*known, precision=config.precision)
        if attack == "merged":
            return change_weights(*known, original=config.original, share=config.merged_share)
        if attack == "inversion":
            return invert(family, targets, config.num_inference_steps, config.sample_batch_size)
        if attack in FROM_PICTURES:
            strength = config.strength if attack == "image_to_image" else 1.0
            return FoundPictures(targets, attack, "" if config.unnamed else self.words[0], strength)
        if attack == "relearn":
            trained = None if others is None else (others, self.other_prompts)
            return relearn(*known, others=trained, every=config.relearn_every)
        return attack_embedding(*known)


def run_attack(config: AttackConfig) -> dict:
    """Attack, judge and write attack.json, attack.md, report.html; the numbers as they stand in attack.json.

    Raises:
        ValueError, ModelLoadError: wrong input, before anything is drawn.
        StageMismatch: the folder holds the result of another configuration.
    """
    check_foreign(Path(config.output_dir), "attack.json")
    config = complete(config)
    models, judge = roles(config), None
    if config.classifier is not None:
        judge = ClassifierJudge.load(config.classifier, split_phrasings(config.concept))
    check_victims(config, judge.classifier.config.image_size if judge else None)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    attacks = attacks_of(config)
    say(describe_plan(config, attacks, judge))
    for line in look(attacks, models):
        say(line)
    with run_lock(config.output_dir):
        remove_leftovers(config.output_dir)
        runs, attacked = {label: AttackRun(one, label) for label, one in attacks.items()}, defaultdict(dict)
        for role, model in models.items():
            family = load_family(config, model)
            hashes = pipeline_hashes(family.pipeline) | _guided_by(family)
            for label, run in runs.items():
                if not meets(run.config, role):
                    continue
                say(f"attack{f' ({label})' * bool(label)}: {role} ({model})")
                attacked[label][role] = run.attack(role, model, family, hashes)
        targets = to_uint8(run.target_images)
        results = {label: summarise(one, attacked[label], targets, judge) for label, one in attacks.items()}
        result = {"concept": config.concept, "attacks": results} if config.all else results[""]
        write_results(config, result, attacked, targets)
    return result


def _decode(family: Family, latents: Tensor) -> Tensor:
    return torch.cat([family.decode(part) for part in latents.split(16)])


def _guided_by(family: Family) -> dict[str, str]:
    """What a method that leaves the weights as they are has made of a pipeline, which its hashes do not tell."""
    config = family.pipeline.config
    return {name: str(value) for name, value in config.items() if name in ("safety_concept", "safety_level")}
