"""Attack a forgotten model, the original and a control alike: targets, attacks, pictures, numbers; resumable."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sa_diffusers.attacks import (
    AttackSettings,
    FoundEmbedding,
    FoundText,
    attack_embedding,
    attack_text,
    draw_found,
)
from sa_diffusers.attacks.attacked import (
    check_folder,
    check_resolutions,
    complete,
    describe_plan,
    first_tokens,
    load_family,
    load_judge,
    roles,
)
from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.attacks.results import Attacked, summarise, write_results
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.prompts import split_phrasings
from sa_diffusers.families.stable_diffusion import TextToImageFamily
from sa_diffusers.io.artifacts import RunLock, hash_tensors
from sa_diffusers.io.atomic_files import atomic_path, remove_leftovers
from sa_diffusers.io.loading import model_hash, pipeline_hashes
from sa_diffusers.io.stages import Stages
from sa_diffusers.report.pictures import to_uint8


class AttackRun:
    """One run in one folder; every stage leaves files there and is reused if they are of the same configuration.

    Args:
        config: as `complete` returns it.
    """

    def __init__(self, config: AttackConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.words = split_phrasings(config.concept)
        self.stages = Stages(self.folder, config.overwrite)
        self.settings = [
            AttackSettings(
                config.num_tokens, config.steps, config.batch_size, config.learning_rate,
                derive_seed(config.seed, "restart", restart), config.initial, config.keep_every,
            )
            for restart in range(config.num_restarts)
        ]  # fmt: skip
        self.targets = self.target_images = self.target_vae = None

    def attack(self, role: str, model: str) -> Attacked:
        """All stages of one model; the original comes first and draws the targets."""
        family = load_family(self.config, model)
        hashes = pipeline_hashes(family.pipeline)
        if role == "original":
            self._draw_targets(family, hashes)
        targets, own = self._targets_for(family), role.replace(" ", "-")
        drawing = self._drawing(hashes, "picture", self.config.num_images)
        word = FoundText(self.words[0], [], [])
        before = self._pictures(family, own, "before", word, drawing | {"word": word.text})
        after, found = [], []
        for restart, settings in enumerate(self.settings):
            key = {
                "attack": self.config.attack, "settings": asdict(settings), "words": list(self.words),
                "allow_concept_words": self.config.allow_concept_words, "templates": self.config.templates,
                "targets": hash_tensors({"targets": targets}), "model": hashes,
            }  # fmt: skip
            found.append(self._find(family, targets, own, restart, settings, key))
            after.append(self._pictures(family, own, f"after-{restart}", found[-1], drawing | {"found": key}))
            if role == "original" and restart == 0:
                print(self._time_left(), flush=True)
        return Attacked(model, before, after, found)

    def _time_left(self) -> str:
        """What is left after the first attack, as if all took as long as it and nothing was there already."""
        attack, pictures = (self.stages.seconds[f"original-{name}-0"] for name in ("attack", "after"))
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
        return {name: getattr(self.config, name) for name in names} | {
            "model": hashes, "purpose": purpose, "count": count
        }  # fmt: skip

    def _draw(self, family: TextToImageFamily, found: FoundEmbedding | FoundText, purpose: str, count: int) -> Tensor:
        config = self.config
        seeds = [derive_seed(config.seed, f"attack {purpose}", index) for index in range(count)]
        return draw_found(
            family, found, config.templates, seeds, config.guidance_scale, config.num_inference_steps,
            config.sample_batch_size,
        )  # fmt: skip

    def _draw_targets(self, family: TextToImageFamily, hashes: dict[str, str]) -> None:
        path, count = self.folder / "targets.safetensors", self.config.num_targets

        def compute() -> Tensor:
            latents = self._draw(family, FoundText(self.words[0], [], []), "target", count)
            _save(path, latents)
            return latents

        key = self._drawing(hashes, "target", count) | {"word": self.words[0]}
        self.targets = self.stages.run("targets", key, compute, lambda: load_file(path)["tensor"])
        self.target_images, self.target_vae = _decode(family, self.targets), model_hash(family.pipeline.vae)

    def _targets_for(self, family: TextToImageFamily) -> Tensor:
        """The targets in a model's own latent space: as they were drawn, or encoded anew by another autoencoder."""
        if self.target_images.shape[-1] != family.resolution:
            raise ValueError(
                f"the original draws pictures of {self.target_images.shape[-1]} pixels, this model {family.resolution}"
            )
        if model_hash(family.pipeline.vae) == self.target_vae:
            return self.targets
        parts = self.target_images.split(16)
        return torch.cat([family.encode(part, seeded("attack targets", i)) for i, part in enumerate(parts)])

    def _find(
        self,
        family: TextToImageFamily,
        targets: Tensor,
        own: str,
        restart: int,
        settings: AttackSettings,
        key: dict,
    ) -> FoundEmbedding | FoundText:
        templates, text = self.config.templates, self.config.attack == "text"
        path = self.folder / own / (f"text-{restart}.json" if text else f"embedding-{restart}.safetensors")

        def compute() -> FoundEmbedding | FoundText:
            if text:
                forbidden = () if self.config.allow_concept_words else self.words
                found = attack_text(family, targets, templates, self.words, settings, forbidden)
            else:
                found = attack_embedding(family, targets, templates, self.words, settings)
            found.save(path)
            return found

        load = (FoundText if text else FoundEmbedding).load
        return self.stages.run(f"{own}-attack-{restart}", key, compute, lambda: load(path))

    def _pictures(
        self, family: TextToImageFamily, own: str, name: str, found: FoundEmbedding | FoundText, key: dict
    ) -> Tensor:
        path = self.folder / own / f"{name}.safetensors"

        def compute() -> Tensor:
            images = to_uint8(_decode(family, self._draw(family, found, "picture", self.config.num_images)))
            _save(path, images)
            return images

        return self.stages.run(f"{own}-{name}", key, compute, lambda: load_file(path)["tensor"])


def run_attack(config: AttackConfig) -> dict:
    """Attack, judge and write attack.json, attack.md, report.html; the numbers as they stand in attack.json.

    Raises:
        ValueError, ModelLoadError: wrong input, before anything is drawn.
        StageMismatch: the folder holds the result of another configuration.
    """
    check_folder(config.output_dir)
    config = complete(config)
    models, judge = roles(config), load_judge(config)
    check_resolutions(models, judge.classifier.config.image_size if judge else None)
    print(describe_plan(config, judge), flush=True)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    # Each is loaded and let go: a failure of the last one must not come after hours on the first.
    for line in dict.fromkeys([first_tokens(config, model) for model in models.values()]):
        print(line, flush=True)
    with RunLock(config.output_dir):
        remove_leftovers(config.output_dir)
        run = AttackRun(config)
        attacked = {}
        for role, model in models.items():
            print(f"attack: {role} ({model})", flush=True)
            attacked[role] = run.attack(role, model)
        result = summarise(config, attacked, to_uint8(run.target_images), judge)
        write_results(config, result, attacked, to_uint8(run.target_images))
    return result


def _decode(family: TextToImageFamily, latents: Tensor) -> Tensor:
    return torch.cat([family.decode(part) for part in latents.split(16)])


def _save(path: Path, tensor: Tensor) -> None:
    with atomic_path(path) as temporary:
        save_file({"tensor": tensor.contiguous()}, temporary)
