"""Train a class-conditional base model from labelled images: the conditional VAE of the MNIST experiments."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sa_diffusers.artifacts import RunLock, Stage, atomic_path
from sa_diffusers.labelled_images import LabelledImages
from sa_diffusers.losses import VAELoss
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.objectives import Likelihood
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.processes import process_state
from sa_diffusers.seeding import derive_seed
from sa_diffusers.training import NOT_IDENTITY, TrainingConfig, infinite_indices, train


@dataclass
class LabelledBaseConfig(TrainingConfig):
    """Everything `scripts/train_base.py` can be told of a class-conditional model."""

    family: Literal["conditional_vae"] = field(default="conditional_vae", metadata={"help": "What to train."})
    dataset: Literal["mnist", "digits8x8"] = field(
        default="digits8x8",
        metadata={"help": "mnist (hub id or local folder), or digits8x8: scikit-learn's bundled digits, offline."},
    )
    data_dir: str = field(default="ylecun/mnist", metadata={"help": "Hub id or local folder (dataset mnist)."})
    output_dir: str = field(
        default="runs/base", metadata={"help": "Folder of the run; `pipeline/` inside is the model."}
    )
    hidden_sizes: list[int] = field(
        default_factory=lambda: [512, 256], metadata={"help": "Widths of the encoder's hidden layers."}
    )
    latent_dim: int = field(default=8, metadata={"help": "Dimension of the latent code."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads; null: as the environment says (`accelerate launch` says 1)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every random number."})


def train_conditional_vae(data: LabelledImages, config: LabelledBaseConfig) -> ConditionalVAEPipeline:
    """Train the model that `<output_dir>/pipeline` then holds; an interrupted run goes on from its last checkpoint.

    Raises:
        StageMismatch: the folder holds a run of another configuration.
    """
    output_dir = Path(config.output_dir)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with RunLock(output_dir):
        claim = Stage(output_dir, "run", {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY})
        if not claim.done:
            claim.finish(0.0)
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
        pipeline = ConditionalVAEPipeline(vae, {str(index): name for index, name in enumerate(data.names)})
        if process_state().is_main_process:
            with atomic_path(output_dir / "pipeline") as temporary:
                pipeline.save_pretrained(temporary)
    return pipeline


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
