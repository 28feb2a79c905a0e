"""Train a small text-to-image pipeline from captioned images: autoencoder, tokenizer, text encoder, denoiser.

The parts are trained in the order of Stable Diffusion: the text encoder by matching images and captions, as CLIP was,
and then frozen. Trained together with a UNet instead, it found the inks and backgrounds but, with captions as varied
as those of the digits, hardly a digit in 4,000 steps.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sa_diffusers.core.batches import Batch, take, to
from sa_diffusers.core.losses import FlowMatchingLoss
from sa_diffusers.core.objectives import AutoencoderLikelihood, CaptionMatching, Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.families import Family, get_family
from sa_diffusers.families.architectures import build_text_to_image, missing_parts
from sa_diffusers.io.atomic_files import load_tensors, save_tensors
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import option, read_yaml
from sa_diffusers.io.processes import process_state, progress_bar
from sa_diffusers.models.tokenizer import build_text_encoder, train_tokenizer
from sa_diffusers.runs.base.run_folder import BaseOptions, claimed, part_settings, save_model, told_by
from sa_diffusers.training.loop import infinite_indices, train


WARMUP = 100  # optimiser steps of the parts before the denoiser, or a tenth of theirs


class CaptionedImages(Protocol):
    """Images [C, H, W] in [-1, 1] with captions; a caption may differ from call to call, as `rng` decides."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor: ...

    def caption(self, index: int, rng: random.Random) -> str: ...


@dataclass
class BaseConfig(BaseOptions):
    """Everything `sa-diffusers train-base` can be told. The fields of TrainingConfig are those of the denoiser."""

    family: Literal["text_to_image"] = option("text_to_image", "What to train.")
    data_dir: str = option("ylecun/mnist", "Hub id or local folder of the images.", identity=False)
    dataset: Literal["imagefolder", "digits"] = option(
        "imagefolder", "imagefolder (images + metadata.jsonl with a `text` column) or digits (MNIST, coloured)."
    )
    architecture: str = option(
        "bundled/digits/architecture.yaml",
        "YAML with the configurations of vae, text_encoder, scheduler, and unet, or the "
        "transformer of a small Stable Diffusion 3.",
    )
    resolution: int = option(32, "Height and width of the images in pixels.", above=0)
    caption_dropout: float = option(0.1, "Share of empty captions, for guidance.", least=0, below=1)
    num_copies: int = option(1, "Colourings of every digit (dataset digits).", above=0)
    exclude_classes: list[str] = option([], "Digits, inks, backgrounds, strokes to leave out: it never learns them.")
    vocab_merges: int = option(700, "Merges of the tokenizer's byte-pair encoding.", least=0)
    snr_gamma: float | None = option(
        5.0, "Min-SNR weighting (Hang et al. 2023), of diffusion alone; null: off.", above=0
    )
    density: Literal["uniform", "logit_normal", "mode"] = option("uniform", "Of noise levels, in a flow.")
    pooled_dropout: float = option(
        0.0, "Share of captions whose pooled text is the empty one's: tokens tell of them.", least=0, below=1
    )
    tokens_dropout: float = option(
        0.0, "Share of others whose tokens are the empty one's: pooled text tells of them.", least=0, below=1
    )
    vae_steps: int = option(3000, "Optimiser steps of the autoencoder.", above=0)
    vae_batch_size: int = option(32, "Images in an optimiser step of the autoencoder.", above=0)
    vae_learning_rate: float = option(2e-3, "Peak learning rate of the autoencoder (cosine).", above=0)
    vae_kl_weight: float = option(5e-4, "Weight of the KL term, per latent value.", least=0)
    text_steps: int = option(2000, "Optimiser steps of the text encoder.", above=0)
    text_batch_size: int = option(256, "Pairs of image and caption in such a step.", above=1)
    text_learning_rate: float = option(1e-3, "Peak learning rate of that (cosine).", above=0)
    save_dtype: Literal["float32", "float16"] = option("float32", "Precision of the files.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset != "digits" and (self.exclude_classes or self.num_copies > 1):
            raise ValueError(f"exclude_classes, num_copies: expected dataset digits, got {self.dataset}; omit them")


class TrainableAutoencoder(nn.Module):
    """An AutoencoderKL as (images, noise) -> (reconstruction, mean KL to N(0, I) per latent value)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, kl


class TrainableMatcher(nn.Module):
    """A text encoder with a small image tower on latents: (latents, token ids) -> logits [B, B], as in CLIP."""

    def __init__(self, text_encoder: CLIPTextModel, latent_channels: int, width: int = 96):
        super().__init__()
        size = text_encoder.config.projection_dim
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(text_encoder.config.hidden_size, size, bias=False)
        self.image_tower = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * width, size),
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, sample: Tensor, input_ids: Tensor) -> Tensor:
        image = nn.functional.normalize(self.image_tower(sample), dim=1)
        text = nn.functional.normalize(self.text_projection(self.text_encoder(input_ids).pooler_output), dim=1)
        return self.log_scale.exp().clamp(max=100) * image @ text.T


def train_vae(data: CaptionedImages, architecture: dict, config: BaseConfig, checkpoint_dir: Path) -> AutoencoderKL:
    """Train the autoencoder and set `scaling_factor` so that latents have unit variance (Rombach et al., App. G)."""
    torch.manual_seed(derive_seed(config.seed, "vae"))
    vae = AutoencoderKL(**architecture)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent_shape = (vae.config.latent_channels, config.resolution // factor, config.resolution // factor)

    def batches(step: int) -> dict[str, Tensor]:
        indices = infinite_indices(len(data), config.vae_batch_size, step, derive_seed(config.seed, "vae order"))
        return {"sample": torch.stack([data.image(index) for index in indices])}

    train(
        TrainableAutoencoder(vae),
        AutoencoderLikelihood(latent_shape, config.vae_kl_weight),
        batches,
        part_settings(config, "vae", config.vae_steps, WARMUP, logging_steps=50),
        seed=derive_seed(config.seed, "vae"),
        checkpoint_dir=checkpoint_dir,
        description="autoencoder",
    )
    sample = torch.cat([encode(vae, data, range(start, start + 64), config.seed) for start in range(0, 1024, 64)])
    vae.register_to_config(scaling_factor=1 / sample.std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, data: CaptionedImages, indices: range, seed: int) -> Tensor:
    """Posterior samples of the images at `indices` (taken modulo the set's size), unscaled, on the CPU."""
    images = torch.stack([data.image(index % len(data)) for index in indices]).to(vae.device)
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=seeded(seed, "encode", indices.start))
    return (posterior.mean + posterior.std * noise.to(vae.device)).cpu()


def load_or_encode_latents(vae: AutoencoderKL, data: CaptionedImages, config: BaseConfig, path: Path) -> Tensor:
    """Scaled latents [N, C, H, W] of the whole set; computed once, kept in `path`."""
    if not path.exists():
        blocks = [range(start, min(start + 256, len(data))) for start in range(0, len(data), 256)]
        latents = torch.cat(
            [encode(vae, data, block, config.seed) for block in progress_bar(blocks, "encode", "blocks")]
        )
        save_tensors({"latents": latents * vae.config.scaling_factor}, path)
    return load_tensors(path, "latents")[0]["latents"]


@dataclass
class CaptionedLatents:
    """Batches of latents and the token ids of their captions; a caption is drawn anew each time."""

    latents: Tensor
    data: CaptionedImages
    tokenizer: CLIPTokenizer
    seed: int

    def pairs(self, step: int, batch_size: int, dropout: float = 0.0) -> tuple[Tensor, list[str]]:
        """Those of batch `step`, with the share `dropout` of captions left empty."""
        indices = infinite_indices(len(self.data), batch_size, step, derive_seed(self.seed, "order"))
        rng = random.Random(f"captions {self.seed} {step}")
        return self.latents[indices], captions_of(self.data, indices, rng, dropout)

    def tokenized(self, step: int, batch_size: int) -> dict[str, Tensor]:
        latents, texts = self.pairs(step, batch_size)
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return {"sample": latents, "input_ids": tokens.input_ids}

    @torch.no_grad()
    def encoded(self, family: Family, step: int, config: "BaseConfig") -> Batch:
        """Batch `step` as the family's loss takes it; captions are too many to keep what they are encoded as."""
        latents, texts = self.pairs(step, config.train_batch_size, config.caption_dropout)
        batch = family.encode_prompts([*texts, ""])
        chance = torch.rand(len(texts), generator=seeded(self.seed, "pooled", step))
        without = {"pooled": chance < config.pooled_dropout, "tokens": chance >= 1 - config.tokens_dropout}
        for name, part in family.text_parts(batch).items():
            part[:-1][without[name]] = part[-1]
        return {"sample": latents} | to(take(batch, slice(len(texts))), "cpu")


def captions_of(data: CaptionedImages, indices: list[int], rng: random.Random, dropout: float = 0.0) -> list[str]:
    texts = [data.caption(index, rng) for index in indices]
    return ["" if rng.random() < dropout else text for text in texts]


def train_text_encoder(
    batches: CaptionedLatents, architecture: dict, config: BaseConfig, checkpoint_dir: Path
) -> CLIPTextModel:
    """Train the text encoder by matching images and captions; the image tower is thrown away."""
    torch.manual_seed(derive_seed(config.seed, "text"))
    text_encoder = build_text_encoder(architecture, batches.tokenizer)
    train(
        TrainableMatcher(text_encoder, latent_channels=batches.latents.shape[1]),
        CaptionMatching(),
        lambda step: batches.tokenized(step, config.text_batch_size),
        part_settings(config, "text", config.text_steps, WARMUP, logging_steps=25, weight_decay=0.01),
        seed=derive_seed(config.seed, "text"),
        checkpoint_dir=checkpoint_dir,
        description="text encoder",
    )
    return text_encoder


def read_architecture(config: BaseConfig) -> dict[str, dict]:
    """Of every part by its name. Raises ValueError: parts without one, or options that do not fit what is trained."""
    architecture = read_yaml(resolve(config.architecture))
    if missing := missing_parts(architecture):
        raise ValueError(f"expected a configuration of every part in {config.architecture}, got none of {missing[0]}")
    flow = "transformer" in architecture
    for wrong, fault in (
        (flow and config.snr_gamma is not None, "snr_gamma weights timesteps of diffusion; pass null for a flow"),
        (not flow and config.density != "uniform", "density is of a flow; omit it"),
        (not flow and config.pooled_dropout, "pooled_dropout: this model reads no pooled text; omit it"),
        (not flow and config.tokens_dropout, "tokens_dropout: this model reads no pooled text; omit it"),
    ):
        if wrong:
            raise ValueError(fault)
    return architecture


def train_base(data: CaptionedImages, config: BaseConfig) -> DiffusionPipeline:
    """Train a pipeline of this architecture from nothing and save it to `<output_dir>/pipeline`. Raises as `claimed`.

    Finished parts lie in `<output_dir>/parts` and are reused when the same command runs again.
    """
    architecture = read_architecture(config)
    with claimed(config, told_by(len(data), data.image)) as output_dir:
        parts, checkpoints = output_dir / "parts", output_dir / "checkpoints"
        if not (parts / "vae").exists():
            vae = train_vae(data, architecture["vae"], config, checkpoints / "vae")
            save_model(vae, parts / "vae")
        vae = AutoencoderKL.from_pretrained(parts / "vae").to(process_state().device)
        latents = load_or_encode_latents(vae, data, config, parts / "latents.safetensors")
        # Of the captions of 50,000 images, some of them more than once where there are fewer.
        chosen = infinite_indices(len(data), 50_000, 0, derive_seed(config.seed, "order"))
        corpus = captions_of(data, chosen, random.Random(f"corpus {config.seed}"))
        length = architecture["text_encoder"]["max_position_embeddings"]
        tokenizer = train_tokenizer(corpus, config.vocab_merges, length)
        batches = CaptionedLatents(latents, data, tokenizer, config.seed)
        if not (parts / "text_encoder").exists():
            trained = train_text_encoder(batches, architecture["text_encoder"], config, checkpoints / "text_encoder")
            save_model(trained, parts / "text_encoder")
        text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32)
        pipeline = build_text_to_image(architecture, vae, text_encoder, tokenizer, config.seed)
        family = get_family(pipeline.to(process_state().device))
        for encoder in family.text_encoders:
            encoder.eval()
        if isinstance(family.loss, FlowMatchingLoss):
            family.loss.density = config.density
        train(
            family.module,
            Likelihood(family.loss, config.snr_gamma),
            lambda step: batches.encoded(family, step, config),
            config,
            seed=derive_seed(config.seed, family.component),
            checkpoint_dir=checkpoints / family.component,
            log_dir=output_dir / "logs",
            description=family.component,
        )
        save_model(pipeline, output_dir / "pipeline", config.save_dtype)
    return pipeline
