"""Attack a forgotten model, the original and a control alike: targets, attacks, pictures, numbers; resumable."""

import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sa_diffusers.attacks import AttackSettings, FoundEmbedding, FoundText, attack_embedding, attack_text, draw_found
from sa_diffusers.attacks.found import Found
from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.attacks.relearning import FoundAdapter, relearn
from sa_diffusers.attacks.results import Attacked, load_judge, summarise, write_results
from sa_diffusers.attacks.victims import check_victims, complete, first_tokens, load_family, roles
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
}  # fmt: skip


class AttackRun:
    """One run in one folder; every stage leaves files there and is reused if they are of the same configuration.

    Args:
        config: as `complete` returns it.
        label: of the attack, where several share the folder, its targets, and the pictures before.
    """

    def __init__(self, config: AttackConfig, label: str = ""):
        self.config, self.folder = config, Path(config.output_dir)
        self.label = f"{label.replace(' ', '-')}-" if label else ""
        self.words = split_phrasings(config.concept)
        self.word = FoundText(self.words[0], [], [])
        self.seconds: dict[str, float] = {}  # by stage
        self.targets = self.target_images = self.target_vae = None

    def settings(self, restart: int) -> AttackSettings:
        """How a restart searches."""
        given = {field.name: getattr(self.config, field.name) for field in fields(AttackSettings)}
        return AttackSettings(**given | {"seed": derive_seed(self.config.seed, "restart", restart)})

    def attack(self, role: str, model: str) -> Attacked:
        """All stages of one model; the original comes first and draws the targets."""
        family = load_family(self.config, model)
        hashes = pipeline_hashes(family.pipeline)
        if role == "original":
            self._draw_targets(family, hashes)
        targets, own = self._targets_for(family), role.replace(" ", "-")
        drawing = self._drawing(hashes, "picture", self.config.num_images)

        def pictures(name: str, found: Found, key: dict) -> Tensor:
            def compute() -> Tensor:
                return to_uint8(_decode(family, self._draw(family, found, "picture", self.config.num_images)))

            return self._tensor(f"{own}-{name}", drawing | key, self.folder / own / f"{name}.safetensors", compute)

        before = pictures("before", self.word, {"word": self.word.text})
        after, found = [], []
        for restart in range(self.config.num_restarts):
            key = {
                "attack": self.config.attack, "settings": asdict(self.settings(restart)), "words": list(self.words),
                "allow_concept_words": self.config.allow_concept_words, "templates": self.config.templates,
                "targets": hash_tensors({"targets": targets}), "model": hashes,
            }  # fmt: skip
            found.append(self._find(family, targets, own, restart, key))
            after.append(pictures(f"after-{self.label}{restart}", found[-1], {"found": key}))
            if role == "original" and restart == 0:
                say(self._time_left())
        return Attacked(model, before, after, found)

    def _time_left(self) -> str:
        """What is left after the first attack, as if all took as long as it and nothing was there already."""
        attack, pictures = (self.seconds[f"original-{name}-{self.label}0"] for name in ("attack", "after"))
        models = len(roles(self.config))
        others = models * self.config.num_restarts - 1
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

    def _draw_targets(self, family: Family, hashes: dict[str, str]) -> None:
        count = self.config.num_targets
        key = self._drawing(hashes, "target", count) | {"word": self.word.text}
        path = self.folder / "targets.safetensors"
        self.targets = self._tensor("targets", key, path, lambda: self._draw(family, self.word, "target", count))
        self.target_images, self.target_vae = _decode(family, self.targets), model_hash(family.pipeline.vae)

    def _targets_for(self, family: Family) -> Tensor:
        """The targets in a model's own latent space: as they were drawn, or encoded anew by another autoencoder."""
        if model_hash(family.pipeline.vae) == self.target_vae:
            return self.targets
        parts = self.target_images.split(16)
        return torch.cat([family.encode(part, seeded("attack targets", i)) for i, part in enumerate(parts)])

    def _find(self, family: Family, targets: Tensor, own: str, restart: int, key: dict) -> Found:
        config, attack = self.config, self.config.attack
        text, kind = attack == "text", {"text": FoundText, "relearn": FoundAdapter}.get(attack, FoundEmbedding)
        path = self.folder / own / f"{attack}-{self.label}{restart}.{'json' if text else 'safetensors'}"

        def compute() -> Found:
            known = family, targets, config.templates, self.words, self.settings(restart)
            forbidden = () if config.allow_concept_words else self.words
            search = relearn if attack == "relearn" else attack_embedding
            found = attack_text(*known, forbidden) if text else search(*known)
            found.save(path)
            return found

        return self._stage(f"{own}-attack-{self.label}{restart}", key, compute, lambda: kind.load(path))


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
    say(describe_plan(config, judge))
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    # Each is loaded and let go: a failure of the last one must not come after hours on the first.
    chosen = ALL if config.all else {"": {}}
    attacks = {label: replace(config, all=False, **changes) for label, changes in chosen.items()}
    for line in dict.fromkeys([first_tokens(one, model) for one in attacks.values() for model in models.values()]):
        say(line)
    with RunLock(config.output_dir):
        remove_leftovers(config.output_dir)
        results, attacked = {}, {}
        for label, one in attacks.items():
            run, attacked[label] = AttackRun(one, label), {}
            for role, model in models.items():
                say(f"attack{f' ({label})' * bool(label)}: {role} ({model})")
                attacked[label][role] = run.attack(role, model)
            results[label] = summarise(one, attacked[label], to_uint8(run.target_images), judge)
        result = {"concept": config.concept, "attacks": results} if config.all else results[""]
        write_results(config, result, attacked, to_uint8(run.target_images))
    return result


def describe_plan(config: AttackConfig, judge: ClassifierJudge | None) -> str:
    """What is about to be done, for the terminal."""
    models = roles(config)
    count = len(models) * config.num_restarts
    pictures = config.num_targets + config.num_images * (len(models) + count)
    kinds = len(ALL) if config.all else 1
    count *= kinds
    pictures += len(models) * config.num_restarts * config.num_images * (kinds - 1)
    lines = [f"bring {config.concept!r} back by {', '.join(ALL) if config.all else f'--attack {config.attack}'}"]
    lines += [f"  {role}: {model}" for role, model in models.items()]
    lines += [
        f"{count:,} attacks ({len(models)} models x {config.num_restarts}{f' x {kinds}' * config.all}) of "
        f"{'up to ' * config.all}{config.steps:,} steps, {config.batch_size} targets each",
        f"{pictures:,} pictures: {config.num_targets:,} targets, and {config.num_images:,} of each model before and "
        "after each attack",
        f"  guidance {config.guidance_scale:g}, {config.num_inference_steps} steps of {config.sampler}",
        f"judged by {config.classifier} as {judge.attribute}" if judge else "no classifier: pictures only",
        f"into {Path(config.output_dir).resolve()}; what it holds already is reused",
    ]
    return "\n".join(lines)


def _decode(family: Family, latents: Tensor) -> Tensor:
    return torch.cat([family.decode(part) for part in latents.split(16)])
