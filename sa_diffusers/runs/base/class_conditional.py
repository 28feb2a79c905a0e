"""Train a class-conditional diffusion model on pixels from labelled images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.families import get_family
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.processes import process_state
from sa_diffusers.pipelines import ClassConditionalPipeline
from sa_diffusers.report.pictures import contact_sheet
from sa_diffusers.runs.base.labelled import LabelledBaseConfig, id2label, train_labelled
from sa_diffusers.training.loop import infinite_indices, train


SHEET_COLUMNS = 8  # pictures of each class on the sheets drawn while training


@dataclass
class ClassConditionalConfig(LabelledBaseConfig):
    """Everything `scripts/train_base.py` can be told of class-conditional diffusion; the network is the paper's.

    Raises:
        ValueError: shares outside [0, 1).
    """

    family: Literal["class_conditional"] = field(default="class_conditional", metadata={"help": "What to train."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 256, 256, 256],
        metadata={"help": "Width of each stage; every stage but the last halves the image."},
    )
    layers_per_block: int = field(default=2, metadata={"help": "Residual blocks of each stage."})
    attention_resolutions: list[int] = field(
        default_factory=lambda: [16], metadata={"help": "Image sizes, in pixels, at which stages have self-attention."}
    )
    attention_head_dim: int | None = field(default=None, metadata={"help": "Width of a head; null: one head."})
    norm_num_groups: int = field(default=32, metadata={"help": "Groups of the normalisation."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout in the residual blocks."})
    num_train_timesteps: int = field(default=1000, metadata={"help": "T, the steps of the diffusion."})
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = field(
        default="linear", metadata={"help": "Noise schedule by diffusers' name; linear is from 1e-4 to 0.02."}
    )
    prediction_type: Literal["epsilon", "v_prediction"] = field(
        default="epsilon", metadata={"help": "What the network predicts."}
    )
    loss_reduction: Literal["mean", "sum"] = field(
        default="mean",
        metadata={"help": "Of the error over pixels; the authors' sum, with their clipping at 1, is always clipped."},
    )
    label_dropout: float = field(default=0.1, metadata={"help": "Share of labels replaced by the null class."})
    flip: bool = field(default=True, metadata={"help": "Mirror half of the images; wrong for digits."})
    antithetic: bool = field(default=True, metadata={"help": "Take timesteps t and T - 1 - t in pairs."})
    sample_steps: int | None = field(
        default=None, metadata={"help": "Draw a sheet of samples every so many steps, into `progress/`; null: never."}
    )
    sample_guidance_scale: float = field(default=2.0, metadata={"help": "Guidance of that sheet, as in diffusers."})
    save_dtype: Literal["float32", "float16"] = field(default="float32", metadata={"help": "Precision of the files."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected 0 <= {name} < 1, got {getattr(self, name)}")


def make_unet(config: ClassConditionalConfig, image_size: int, channels: int, num_classes: int) -> UNet2DModel:
    """A UNet conditioned by FiLM on the sum of the embeddings of timestep and class; the last class is the null class.

    Raises:
        ValueError: images that cannot be halved that often, or attention at a resolution that no stage has.
    """
    count = len(config.block_out_channels)
    resolutions = [image_size // 2**stage for stage in range(count)]
    if image_size % 2 ** (count - 1):
        raise ValueError(f"images of {image_size} pixels cannot be halved {count - 1} times; pass fewer stages")
    absent = [size for size in config.attention_resolutions if size not in resolutions]
    if absent:
        raise ValueError(f"expected attention_resolutions among {resolutions}, got {absent[0]}")
    attends = [size in config.attention_resolutions for size in resolutions]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        norm_eps=1e-6,
        dropout=config.dropout,
        num_class_embeds=num_classes + 1,
        resnet_time_scale_shift="scale_shift",
    )


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


def train_class_conditional(data: LabelledImages, config: ClassConditionalConfig) -> ClassConditionalPipeline:
    """Train the model that `<output_dir>/pipeline` then holds; an interrupted run goes on from its last checkpoint.

    Raises:
        StageMismatch: the folder holds a run of another configuration.
        ValueError: an architecture that does not fit the images.
    """
    channels, size = data.images.shape[1:3]
    torch.manual_seed(derive_seed(config.seed, "unet"))
    unet = make_unet(config, size, channels, len(data.names))
    schedule = DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,  # by name: diffusers forgets what is given by position
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
    )
    pipeline = ClassConditionalPipeline(unet, schedule, id2label(data))
    loss = DiffusionLoss(schedule.alphas_cumprod, config.prediction_type, config.loss_reduction)

    def make(output_dir: Path) -> ClassConditionalPipeline:
        pipeline.to(process_state().device)
        train(
            unet,
            Likelihood(loss, antithetic=config.antithetic),
            TrainingBatches(data, config),
            config,
            seed=derive_seed(config.seed, "train"),
            checkpoint_dir=output_dir / "checkpoints",
            callback=lambda step, row: draw_sheet(pipeline, config, output_dir / "progress" / f"{step:07d}.png"),
            callback_steps=config.sample_steps,
            log_dir=output_dir / "logs",
            description="class-conditional diffusion",
        )
        return pipeline

    return train_labelled(config, make, config.save_dtype)


def draw_sheet(pipeline: ClassConditionalPipeline, config: ClassConditionalConfig, path: Path) -> None:
    """A row of samples of each class, from the same seeds every time."""
    if not process_state().is_main_process:
        return
    family = get_family(pipeline)
    labels = [name for name in pipeline.labels for _ in range(SHEET_COLUMNS)]
    seeds = [derive_seed(config.seed, "sheet", index) for index in range(len(labels))]
    steps = min(20, config.num_train_timesteps // 2)  # the solver refuses as many as the model has
    images = family.decode(family.draw(labels, seeds, config.sample_guidance_scale, steps))
    with atomic_path(path) as temporary:
        contact_sheet(images, SHEET_COLUMNS).save(temporary)
