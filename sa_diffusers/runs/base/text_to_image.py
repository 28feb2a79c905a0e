"""Train a small text-to-image pipeline from captioned images: autoencoder, tokenizer, text encoder, UNet.

The parts are trained in the order of Stable Diffusion: the text encoder by matching images and captions, as CLIP was,
and then frozen. Trained together with the UNet instead, it found the inks and backgrounds but, with captions as varied
as those of the digits, hardly a digit in 4,000 steps.
"""

import json
import random
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import AutoencoderLikelihood, CaptionMatching, Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.io.artifacts import RunLock, Stage
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.processes import process_state
from sa_diffusers.runs.base.trainable_parts import TrainableAutoencoder, TrainableMatcher, TrainableTextToImage
from sa_diffusers.training.loop import NOT_IDENTITY, TrainingConfig, infinite_indices, train


class CaptionedImages(Protocol):
    """Images [C, H, W] in [-1, 1] with captions; a caption may differ from call to call, as `rng` decides."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor: ...

    def caption(self, index: int, rng: random.Random) -> str: ...


@dataclass
class BaseConfig(TrainingConfig):
    """Everything `scripts/train_base.py` can be told. The fields of TrainingConfig are those of the UNet."""

    family: Literal["text_to_image"] = field(default="text_to_image", metadata={"help": "What to train."})
    data_dir: str = field(default="ylecun/mnist", metadata={"help": "Hub id or local folder of the images."})
    dataset: str = field(
        default="imagefolder",
        metadata={"help": "imagefolder (images + metadata.jsonl with a `text` column) or digits (MNIST, coloured)."},
    )
    output_dir: str = field(
        default="runs/base", metadata={"help": "Folder of the run; `pipeline/` inside is the model."}
    )
    architecture: str = field(
        default="bundled/digits/architecture.yaml",
        metadata={"help": "YAML with the configurations of vae, unet, text_encoder and scheduler."},
    )
    resolution: int = field(default=32, metadata={"help": "Height and width of the images in pixels."})
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of empty captions, for guidance."})
    num_copies: int = field(default=1, metadata={"help": "Colourings of every digit (dataset digits)."})
    exclude_classes: list[str] = field(
        default_factory=list, metadata={"help": "Digits to leave out, as words: a model that never learned them."}
    )
    vocab_merges: int = field(default=700, metadata={"help": "Merges of the tokenizer's byte-pair encoding."})
    snr_gamma: float | None = field(
        default=5.0, metadata={"help": "Min-SNR weighting (Hang et al. 2023); null: none."}
    )
    vae_steps: int = field(default=3000, metadata={"help": "Optimiser steps of the autoencoder."})
    vae_batch_size: int = field(default=32, metadata={"help": "Images in an optimiser step of the autoencoder."})
    vae_learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak learning rate of the autoencoder (cosine)."}
    )
    vae_kl_weight: float = field(default=5e-4, metadata={"help": "Weight of the KL term, per latent value."})
    text_steps: int = field(default=2000, metadata={"help": "Optimiser steps of the text encoder."})
    text_batch_size: int = field(default=256, metadata={"help": "Pairs of image and caption in such a step."})
    text_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of that (cosine)."})
    save_dtype: Literal["float32", "float16"] = field(default="float32", metadata={"help": "Precision of the files."})
    seed: int = field(default=0, metadata={"help": "Seed of every random number."})


def train_tokenizer(captions: list[str], num_merges: int, max_length: int) -> CLIPTokenizer:
    """Train a CLIP tokenizer: every byte alone and at a word's end, `num_merges` merges, then the two special tokens.

    The end token has the largest id, where CLIPTextModel looks for it.
    """
    template = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = template.backend_tokenizer.normalizer
    trained.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=100_000, end_of_word_suffix="</w>", min_frequency=3, show_progress=False)
    trained.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]][:num_merges]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def train_vae(data: CaptionedImages, architecture: dict, config: BaseConfig, output_dir: Path) -> AutoencoderKL:
    """Train the autoencoder and set `scaling_factor` so that latents have unit variance (Rombach et al., App. G)."""
    torch.manual_seed(derive_seed(config.seed, "vae"))
    vae = AutoencoderKL(**architecture)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent_shape = (vae.config.latent_channels, config.resolution // factor, config.resolution // factor)

    def batches(step: int) -> dict[str, Tensor]:
        indices = infinite_indices(len(data), config.vae_batch_size, step, derive_seed(config.seed, "vae order"))
        return {"sample": torch.stack([data.image(index) for index in indices])}

    settings = TrainingConfig(
        num_train_steps=config.vae_steps,
        train_batch_size=config.vae_batch_size,
        learning_rate=config.vae_learning_rate,
        lr_scheduler="cosine",
        lr_warmup_steps=min(100, config.vae_steps // 10),
        mixed_precision=config.mixed_precision,
        checkpointing_steps=config.checkpointing_steps,
        logging_steps=50,
    )
    model = TrainableAutoencoder(vae)
    objective = AutoencoderLikelihood(latent_shape, config.vae_kl_weight)
    train(
        model,
        objective,
        batches,
        settings,
        seed=derive_seed(config.seed, "vae"),
        checkpoint_dir=output_dir / "checkpoints" / "vae",
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
        latents = torch.cat([encode(vae, data, block, config.seed) for block in tqdm(blocks, "encode", mininterval=1)])
        with atomic_path(path) as temporary:
            save_file({"latents": latents * vae.config.scaling_factor}, temporary)
    return load_file(path)["latents"]


class CaptionedLatents:
    """Batches of latents and the token ids of their captions; a caption is drawn anew each time."""

    def __init__(self, latents: Tensor, data: CaptionedImages, tokenizer: CLIPTokenizer, seed: int):
        self.latents, self.data, self.tokenizer, self.seed = latents, data, tokenizer, seed

    def batch(self, step: int, batch_size: int, dropout: float) -> dict[str, Tensor]:
        """Batch `step`, with the share `dropout` of its captions left empty."""
        indices = infinite_indices(len(self.data), batch_size, step, derive_seed(self.seed, "order"))
        texts = captions_of(self.data, indices, random.Random(f"captions {self.seed} {step}"), dropout)
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return {"sample": self.latents[indices], "input_ids": tokens.input_ids}


def captions_of(data: CaptionedImages, indices: list[int], rng: random.Random, dropout: float = 0.0) -> list[str]:
    texts = [data.caption(index, rng) for index in indices]
    return ["" if rng.random() < dropout else text for text in texts]


def train_text_encoder(
    batches: CaptionedLatents, architecture: dict, latent_channels: int, config: BaseConfig, output_dir: Path
) -> CLIPTextModel:
    """Train the text encoder by matching images and captions; the image tower is thrown away."""
    tokenizer = batches.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(derive_seed(config.seed, "text"))
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **architecture, **ids))
    settings = TrainingConfig(
        num_train_steps=config.text_steps,
        train_batch_size=config.text_batch_size,
        learning_rate=config.text_learning_rate,
        lr_scheduler="cosine",
        lr_warmup_steps=min(100, config.text_steps // 10),
        mixed_precision=config.mixed_precision,
        weight_decay=0.01,
        checkpointing_steps=config.checkpointing_steps,
        logging_steps=25,
    )
    train(
        TrainableMatcher(text_encoder, latent_channels),
        CaptionMatching(),
        lambda step: batches.batch(step, config.text_batch_size, dropout=0.0),
        settings,
        seed=derive_seed(config.seed, "text"),
        checkpoint_dir=output_dir / "checkpoints" / "text_encoder",
        description="text encoder",
    )
    return text_encoder


def train_base(data: CaptionedImages, config: BaseConfig) -> StableDiffusionPipeline:
    """Train a Stable Diffusion pipeline from nothing and save it to `<output_dir>/pipeline`.

    Finished parts lie in `<output_dir>/parts` and are reused when the same command runs again.
    """
    output_dir = Path(config.output_dir)
    with RunLock(output_dir) if process_state().is_main_process else nullcontext():
        return _train_parts(data, config, output_dir)


def _train_parts(data: CaptionedImages, config: BaseConfig, output_dir: Path) -> StableDiffusionPipeline:
    key = {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY}
    claim = Stage(output_dir, "base", key, "Pass another --output_dir, or remove this folder first.")
    if not claim.done:
        claim.finish(0.0)
    architecture = yaml.safe_load(Path(resolve(config.architecture)).read_text())
    parts = output_dir / "parts"
    if not (parts / "vae").exists():
        with atomic_path(parts / "vae") as temporary:
            train_vae(data, architecture["vae"], config, output_dir).save_pretrained(temporary)
    vae = AutoencoderKL.from_pretrained(parts / "vae").to(process_state().device)
    latents = load_or_encode_latents(vae, data, config, parts / "latents.safetensors")

    chosen = infinite_indices(len(data), 50_000, 0, derive_seed(config.seed, "order"))
    corpus = captions_of(data, chosen, random.Random(f"corpus {config.seed}"))
    max_length = architecture["text_encoder"]["max_position_embeddings"]
    tokenizer = train_tokenizer(corpus, config.vocab_merges, max_length)
    batches = CaptionedLatents(latents, data, tokenizer, config.seed)
    if not (parts / "text_encoder").exists():
        channels = vae.config.latent_channels
        text_encoder = train_text_encoder(batches, architecture["text_encoder"], channels, config, output_dir)
        with atomic_path(parts / "text_encoder") as temporary:
            text_encoder.save_pretrained(temporary)
    text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32)

    torch.manual_seed(derive_seed(config.seed, "unet"))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**architecture["unet"]),
        scheduler=DDIMScheduler(**architecture["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    loss = DiffusionLoss(pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type)
    train(
        TrainableTextToImage(pipe.unet, text_encoder),
        Likelihood(loss, config.snr_gamma),
        lambda step: batches.batch(step, config.train_batch_size, config.caption_dropout),
        config,
        seed=derive_seed(config.seed, "unet"),
        checkpoint_dir=output_dir / "checkpoints" / "unet",
        description="unet",
    )
    if process_state().is_main_process:
        with atomic_path(output_dir / "pipeline") as temporary:
            pipe.to(getattr(torch, config.save_dtype)).save_pretrained(temporary)
        pipe.to(torch.float32)
    return pipe
