"""Train class-conditional base models from labelled images; here what all have in common, and the conditional VAE."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sa_diffusers.core.losses import VAELoss
from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.labelled_images import DatasetName, LabelledImages
from sa_diffusers.io.artifacts import RunLock, Stage
from sa_diffusers.io.atomic_files import atomic_path, remove_leftovers
from sa_diffusers.io.processes import process_state
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.training.loop import NOT_IDENTITY, TrainingConfig, infinite_indices, train


@dataclass
class LabelledBaseConfig(TrainingConfig):
    """What `scripts/train_base.py` can be told of any class-conditional model."""

    dataset: DatasetName = field(
        default="digits8x8",
        metadata={
            "help": "mnist, cifar10, stl10 (hub id or local folder), or digits8x8: scikit-learn's bundled digits."
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Local folder or hub id of the data set; null: its usual hub id."}
    )
    split: Literal["train", "all"] = field(
        default="train", metadata={"help": "Images to train on; all: the test images, too, as the authors for STL10."}
    )
    exclude_classes: list[str] = field(
        default_factory=list, metadata={"help": "Classes whose images are left out; the model keeps their labels."}
    )
    output_dir: str = field(
        default="runs/base", metadata={"help": "Folder of the run; `pipeline/` inside is the model."}
    )
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads; null: as the environment says (`accelerate launch` says 1)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every random number."})


@dataclass
class ConditionalVAEConfig(LabelledBaseConfig):
    """Everything `scripts/train_base.py` can be told of a conditional VAE."""

    family: Literal["conditional_vae"] = field(default="conditional_vae", metadata={"help": "What to train."})
    hidden_sizes: list[int] = field(
        default_factory=lambda: [512, 256], metadata={"help": "Widths of the encoder's hidden layers."}
    )
    latent_dim: int = field(default=8, metadata={"help": "Dimension of the latent code."})


def claim_folder(config: LabelledBaseConfig) -> None:
    """Make the folder this configuration's. Raises StageMismatch where it holds a run of another one."""
    key = {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY}
    claim = Stage(config.output_dir, "run", key, "Pass another --output_dir, or remove this folder first.")
    if not claim.done:
        claim.finish(0.0)


def train_labelled(
    config: LabelledBaseConfig, make: Callable[[Path], DiffusionPipeline], dtype: str = "float32"
) -> DiffusionPipeline:
    """Claim the folder, train, and save what `make` returns to `<output_dir>/pipeline`.

    Args:
        make: trains the model; told the folder, where it keeps its checkpoints.
        dtype: precision of the files.

    Raises:
        StageMismatch: the folder holds a run of another configuration.
    """
    output_dir, main = Path(config.output_dir), process_state().is_main_process
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with RunLock(output_dir) if main else nullcontext():
        if main:
            claim_folder(config)
            remove_leftovers(output_dir)
        pipeline = make(output_dir)
        if main:
            if dtype != "float32":
                pipeline.to(getattr(torch, dtype))
            with atomic_path(output_dir / "pipeline") as temporary:
                pipeline.save_pretrained(temporary)
            if dtype != "float32":
                pipeline.to(torch.float32)
    return pipeline


def id2label(data: LabelledImages) -> dict[str, str]:
    """The names of the classes as pipelines store them."""
    return {str(index): name for index, name in enumerate(data.names)}


def train_conditional_vae(data: LabelledImages, config: ConditionalVAEConfig) -> ConditionalVAEPipeline:
    """Train the model that `<output_dir>/pipeline` then holds; an interrupted run goes on from its last checkpoint.

    Raises:
        StageMismatch: the folder holds a run of another configuration.
    """

    def make(output_dir: Path) -> ConditionalVAEPipeline:
        torch.manual_seed(derive_seed(config.seed, "vae"))
        channels, size = data.images.shape[1:3]
        vae = ConditionalVAE(size, channels, len(data.names), tuple(config.hidden_sizes), config.latent_dim)
        order = derive_seed(config.seed, "order")

        def batches(step: int) -> dict[str, Tensor]:
            indices = infinite_indices(len(data), config.train_batch_size, step, order)
            return {"sample": data.sample(indices), "labels": data.labels[indices]}

        train(
            vae,
            Likelihood(VAELoss(config.latent_dim)),
            batches,
            config,
            seed=derive_seed(config.seed, "train"),
            checkpoint_dir=output_dir / "checkpoints",
            description="conditional VAE",
        )
        return ConditionalVAEPipeline(vae, id2label(data))

    return train_labelled(config, make)


@torch.no_grad()
def negative_elbo(pipeline: ConditionalVAEPipeline, data: LabelledImages, seed: int = 0) -> Tensor:
    """The negative ELBO of each image [N], in nats, from one draw of z."""
    loss = VAELoss(pipeline.vae.config.latent_dim)
    values = []
    for start in range(0, len(data), 1000):
        indices = list(range(start, min(start + 1000, len(data))))
        batch = {"sample": data.sample(indices), "labels": data.labels[indices]}
        generator = torch.Generator().manual_seed(derive_seed(seed, "test", start))
        terms = torch.zeros(len(indices), dtype=torch.long)
        values.append(loss(pipeline.vae, batch, terms, loss.sample_noise(batch, generator)))
    return torch.cat(values)
