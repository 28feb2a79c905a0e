"""Train models that complete pictures by tokens: first the codebook, then the transformer that tells tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, VQModel
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.objectives import AutoencoderLikelihood, Likelihood
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.families import get_family
from sa_diffusers.families.completion.networks import build_codebook, build_token_inpaint
from sa_diffusers.io.configuration import option
from sa_diffusers.io.processes import process_state
from sa_diffusers.runs.base.completion import CompletionConfig, HoleBatches, read_pictures
from sa_diffusers.runs.base.run_folder import claimed, part_settings, save_model, told_by
from sa_diffusers.training.loop import infinite_indices, train


FITTED = 200  # pictures whose latents the codebook is fitted to


@dataclass
class TokenInpaintConfig(CompletionConfig):
    """Everything `sa-diffusers train-base` can be told of a model of tokens; other steps are the transformer's."""

    family: Literal["token_inpaint"] = option("token_inpaint", "What to train.")
    vq_channels: list[int] = option(
        [8, 16, 32], "Width of each stage of the codebook's autoencoder; every stage but the last halves.", above=0
    )
    num_codes: int = option(128, "Vectors of the codebook.", above=1)
    code_size: int = option(8, "Dimension of such a vector.", above=0)
    vq_warmup_steps: int = option(300, "Steps before there are codes, which are fitted to where they led.", above=0)
    vq_steps: int = option(700, "Steps with it.", above=0)
    vq_batch_size: int = option(32, "Pictures in such a step.", above=0)
    vq_learning_rate: float = option(2e-3, "Their peak learning rate (cosine).", above=0)
    hidden_size: int = option(96, "Width of the transformer.", above=0)
    num_heads: int = option(4, "Heads of every layer.", above=0)
    num_layers: int = option(4, "Layers of the encoder, which forgets.", above=0)
    decoder_num_layers: int = option(2, "Layers of the decoder.", above=0)
    choice_temperature: float = option(4.5, "Of the noise in what is filled first.", least=0)


class TrainableCodebook(nn.Module):
    """A VQModel as (images, noise) -> (reconstruction, commitment loss); without a codebook the loss is 0."""

    def __init__(self, vq: VQModel, quantise: bool):
        super().__init__()
        self.vq, self.quantise = vq, quantise
        vq.quantize.requires_grad_(quantise)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        made = self.vq.decode(self.vq.encode(images).latents, force_not_quantize=not self.quantise)
        return made.sample, made.commit_loss.mean()


def train_codebook(data: LabelledImages, config: TokenInpaintConfig, checkpoints: Path) -> VQModel:
    """An autoencoder, k-means of its latents as the codebook, and both on: else few of the codes are ever used."""
    vq = build_codebook(config, data.images.shape[1], config.seed)

    def batches(step: int) -> Batch:
        rows = infinite_indices(len(data), config.vq_batch_size, step, derive_seed(config.seed, "vq order"))
        return {"sample": 2 * data.sample(rows) - 1}

    for name, steps in (("warmup", config.vq_warmup_steps), ("codebook", config.vq_steps)):
        if name == "codebook":
            fit_codebook(vq, data, config.seed)
        train(
            TrainableCodebook(vq, name == "codebook"),
            AutoencoderLikelihood((1, 1, 1), 1.0),  # whose KL is the commitment loss here
            batches,
            part_settings(config, "vq", steps, 50, logging_steps=50),
            seed=derive_seed(config.seed, name),
            checkpoint_dir=checkpoints / name,
            description=name,
        )
    return vq


@torch.no_grad()
def fit_codebook(vq: VQModel, data: LabelledImages, seed: int) -> None:
    """Make the codes the centres of the latents of some pictures."""
    from sklearn.cluster import KMeans  # seconds, which --help need not take

    rows = infinite_indices(len(data), FITTED, 0, derive_seed(seed, "codes"))
    latents = vq.encode((2 * data.sample(rows) - 1).to(vq.device)).latents.movedim(1, 3).flatten(0, 2)
    codes = vq.quantize.embedding.weight
    fitted = KMeans(len(codes), n_init=1, random_state=derive_seed(seed, "k-means") % 2**32).fit(latents.cpu().numpy())
    codes.copy_(torch.from_numpy(fitted.cluster_centers_))


def train_token_inpaint(config: TokenInpaintConfig) -> DiffusionPipeline:
    """As `train_masked_autoencoder`."""
    data = read_pictures(config)
    vq = build_codebook(config, data.images.shape[1], config.seed)
    pipeline = build_token_inpaint(config, vq, config.seed)
    places = FITTED * pipeline.transformer.config.rows**2
    if config.num_codes > places:
        raise ValueError(
            f"expected num_codes up to {places}, which are fitted to as many places, got {config.num_codes}"
        )
    HoleBatches(get_family(pipeline), data, config)  # or refused
    with claimed(config, told_by(len(data), data.images.__getitem__)) as folder:
        part = folder / "parts" / "vq"
        if not part.exists():
            save_model(train_codebook(data, config, folder / "checkpoints"), part)
        pipeline = build_token_inpaint(config, VQModel.from_pretrained(part), config.seed)
        family = get_family(pipeline.to(process_state().device))
        train(
            family.module,
            Likelihood(family.loss),
            HoleBatches(family, data, config),
            config,
            seed=derive_seed(config.seed, "train"),
            checkpoint_dir=folder / "checkpoints" / "transformer",
            log_dir=folder / "logs",
            description="token transformer",
        )
        save_model(pipeline, folder / "pipeline", config.save_dtype)
    return pipeline
