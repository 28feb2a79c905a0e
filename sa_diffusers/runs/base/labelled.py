"""Train class-conditional base models from labelled images; here what all have in common, and the conditional VAE."""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.labelled_images import DatasetName, LabelledImages
from sa_diffusers.families import get_family
from sa_diffusers.families.architectures import build_conditional_vae
from sa_diffusers.io.configuration import option
from sa_diffusers.runs.base.run_folder import claimed, save_model
from sa_diffusers.training.loop import TrainingConfig, infinite_indices, train


@dataclass
class LabelledBaseConfig(TrainingConfig):
    """What `scripts/train_base.py` can be told of any class-conditional model."""

    dataset: DatasetName = option(
        "digits8x8", "mnist, cifar10, stl10 (hub id or local folder), or digits8x8: scikit-learn's bundled digits."
    )
    data_dir: str | None = option(
        None, "Local folder or hub id of the data set; null: its usual hub id.", identity=False
    )
    split: Literal["train", "all"] = option(
        "train", "Images to train on; all: the test images, too, as the authors for STL10."
    )
    exclude_classes: list[str] = option([], "Classes whose images are left out; the model keeps their labels.")
    output_dir: str = option("runs/base", "Folder of the run; `pipeline/` inside is the model.", identity=False)
    num_threads: int | None = option(
        None, "CPU threads; null: as the environment says (`accelerate launch` says 1).", identity=False
    )
    seed: int = option(0, "Seed of every random number.")


@dataclass
class ConditionalVAEConfig(LabelledBaseConfig):
    """Everything `scripts/train_base.py` can be told of a conditional VAE."""

    family: Literal["conditional_vae"] = option("conditional_vae", "What to train.")
    hidden_sizes: list[int] = option([512, 256], "Widths of the encoder's hidden layers.")
    latent_dim: int = option(8, "Dimension of the latent code.")


def train_conditional_vae(data: LabelledImages, config: ConditionalVAEConfig) -> DiffusionPipeline:
    """Train the model that `<output_dir>/pipeline` then holds; an interrupted run goes on from its last checkpoint.

    Raises:
        StageMismatch: the folder holds a run of another configuration.
    """
    channels, size = data.images.shape[1:3]
    order = derive_seed(config.seed, "order")

    def batches(step: int) -> dict[str, Tensor]:
        indices = infinite_indices(len(data), config.train_batch_size, step, order)
        return {"sample": data.sample(indices), "labels": data.labels[indices]}

    with claimed(config, num_threads=config.num_threads) as output_dir:
        pipeline = build_conditional_vae(
            config.hidden_sizes, config.latent_dim, size, channels, data.names, config.seed
        )
        family = get_family(pipeline)
        train(
            family.module,
            Likelihood(family.loss),
            batches,
            config,
            seed=derive_seed(config.seed, "train"),
            checkpoint_dir=output_dir / "checkpoints",
            description="conditional VAE",
        )
        save_model(pipeline, output_dir / "pipeline")
    return pipeline


@torch.no_grad()
def negative_elbo(pipeline: DiffusionPipeline, data: LabelledImages, seed: int = 0) -> Tensor:
    """The negative ELBO of each image [N], in nats, from one draw of z."""
    family, values = get_family(pipeline), []
    for start in range(0, len(data), 1000):
        indices = list(range(start, min(start + 1000, len(data))))
        batch = {"sample": data.sample(indices), "labels": data.labels[indices]}
        terms = torch.zeros(len(indices), dtype=torch.long)
        noise = family.loss.sample_noise(batch, seeded(seed, "test", start))
        values.append(family.loss(family.module, batch, terms, noise))
    return torch.cat(values)
