"""Train class-conditional base models from labelled images: a conditional VAE, or diffusion on pixels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.labelled_images import DatasetName, LabelledImages
from sa_diffusers.families import Family, get_family
from sa_diffusers.families.architectures import build_class_conditional, build_conditional_vae
from sa_diffusers.io.configuration import option
from sa_diffusers.io.processes import process_state
from sa_diffusers.report.pictures import save_contact_sheet
from sa_diffusers.runs.base.run_folder import BaseOptions, told_by, train_pipeline
from sa_diffusers.training.loop import infinite_indices


SHEET_COLUMNS = 8  # pictures of each class on the sheets drawn while training


@dataclass
class LabelledBaseConfig(BaseOptions):
    """What `sa-diffusers train-base` can be told of any class-conditional model."""

    dataset: DatasetName = option(
        "digits8x8", "mnist, cifar10, stl10 (hub id or local folder), or digits8x8: scikit-learn's bundled digits."
    )
    data_dir: str | None = option(
        None, "Local folder or hub id of the data set; null: its usual hub id.", identity=False
    )
    split: Literal["train", "all"] = option(
        "train", "Images to train on; all: also the test images, as the authors for STL10."
    )
    exclude_classes: list[str] = option([], "Classes whose images are left out; the model keeps their labels.")


@dataclass
class ConditionalVAEConfig(LabelledBaseConfig):
    """Everything `sa-diffusers train-base` can be told of a conditional VAE."""

    family: Literal["conditional_vae"] = option("conditional_vae", "What to train.")
    hidden_sizes: list[int] = option([512, 256], "Widths of the encoder's hidden layers.", above=0)
    latent_dim: int = option(8, "Dimension of the latent code.", above=0)


def train_conditional_vae(data: LabelledImages, config: ConditionalVAEConfig) -> DiffusionPipeline:
    """Train the model that `<output_dir>/pipeline` then holds; an interrupted run goes on. Raises as `claimed`."""
    channels, size = data.images.shape[1:3]
    order = derive_seed(config.seed, "order")

    def batches(step: int) -> dict[str, Tensor]:
        indices = infinite_indices(len(data), config.train_batch_size, step, order)
        return {"sample": data.sample(indices), "labels": data.labels[indices]}

    pipeline = build_conditional_vae(config.hidden_sizes, config.latent_dim, size, channels, data.names, config.seed)
    family = get_family(pipeline)
    pictures = told_by(len(data), data.images.__getitem__)
    return train_pipeline(family, Likelihood(family.loss), batches, config, pictures, description="conditional VAE")


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


@dataclass
class ClassConditionalConfig(LabelledBaseConfig):
    """Everything `sa-diffusers train-base` can be told of class-conditional diffusion; the network is the paper's."""

    family: Literal["class_conditional"] = option("class_conditional", "What to train.")
    block_out_channels: list[int] = option(
        [128, 256, 256, 256], "Width of each stage; every stage but the last halves the image.", above=0
    )
    layers_per_block: int = option(2, "Residual blocks of each stage.", above=0)
    attention_resolutions: list[int] = option(
        [16], "Image sizes, in pixels, at which stages have self-attention.", above=0
    )
    attention_head_dim: int | None = option(None, "Width of a head; null: one head.", above=0)
    norm_num_groups: int = option(32, "Groups of the normalisation.", above=0)
    dropout: float = option(0.1, "Dropout in the residual blocks.", least=0, below=1)
    num_train_timesteps: int = option(1000, "T, the steps of the diffusion.", above=1)
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = option(
        "linear", "Noise schedule by diffusers' name; linear is from 1e-4 to 0.02."
    )
    prediction_type: Literal["epsilon", "v_prediction"] = option("epsilon", "What the network predicts.")
    clip_sample: bool = option(
        False,
        "Keep what a noisy image is taken for within [-1, 1] as images are drawn, as DDPM does; else the errors of a "
        "short training at high noise become saturated colours.",
        later=True,
    )
    loss_reduction: Literal["mean", "sum"] = option(
        "mean", "Of the error over pixels; the authors' sum, with their clipping at 1, is always clipped."
    )
    label_dropout: float = option(0.1, "Share of labels replaced by the null class.", least=0, below=1)
    flip: bool = option(True, "Mirror half of the images; wrong for digits.")
    antithetic: bool = option(True, "Take timesteps t and T - 1 - t in pairs.")
    sample_steps: int | None = option(
        None, "Draw a sheet of samples every so many steps, into `progress/`; null: off.", above=0, identity=False
    )
    sample_guidance_scale: float = option(2.0, "Guidance of that sheet, as in diffusers.", least=0, identity=False)
    save_dtype: Literal["float32", "float16"] = option("float32", "Precision of the files.")


class TrainingBatches:
    """Batches of images in [-1, 1], some mirrored, with their labels, some of them dropped; a function of the step."""

    def __init__(self, data: LabelledImages, config: ClassConditionalConfig):
        self.data, self.config, self.null_class = data, config, len(data.names)

    def __call__(self, step: int) -> dict[str, Tensor]:
        config = self.config
        indices = infinite_indices(len(self.data), config.train_batch_size, step, derive_seed(config.seed, "order"))
        images, labels = 2 * self.data.sample(indices) - 1, self.data.labels[indices].clone()
        drawn = torch.rand(2, len(indices), generator=seeded(config.seed, "augment", step))
        labels[drawn[0] < config.label_dropout] = self.null_class
        if config.flip:
            mirrored = drawn[1] < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return {"sample": images, "class_labels": labels}


def train_class_conditional(data: LabelledImages, config: ClassConditionalConfig) -> DiffusionPipeline:
    """As `train_conditional_vae`. Also raises ValueError: an architecture that does not fit the images."""
    channels, size = data.images.shape[1:3]
    pipeline = build_class_conditional(config, size, channels, data.names, config.seed)
    loss = DiffusionLoss(pipeline.scheduler.alphas_cumprod, config.prediction_type, config.loss_reduction)
    family, sheets = get_family(pipeline.to(process_state().device)), Path(config.output_dir) / "progress"
    return train_pipeline(
        family,
        Likelihood(loss, antithetic=config.antithetic),
        TrainingBatches(data, config),
        config,
        told_by(len(data), data.images.__getitem__),
        callback=lambda step, row: draw_sheet(family, config, sheets / f"{step:07d}.png"),
        callback_steps=config.sample_steps,
        description="class-conditional diffusion",
    )


def draw_sheet(family: Family, config: ClassConditionalConfig, path: Path) -> None:
    """A row of samples of each class, from the same seeds every time."""
    if not process_state().is_main_process:
        return
    asked = [Condition(name) for name in family.labels for _ in range(SHEET_COLUMNS)]
    seeds = [derive_seed(config.seed, "sheet", index) for index in range(len(asked))]
    steps = min(20, config.num_train_timesteps // 2)  # the solver refuses as many as the model has
    images = family.decode(family.draw(asked, seeds, config.sample_guidance_scale, steps))
    save_contact_sheet(images, path, SHEET_COLUMNS)
