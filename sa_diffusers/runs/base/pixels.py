"""Train models that complete pictures by denoising pixels."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers import DiffusionPipeline

from sa_diffusers.core.conditions import DEGRADATIONS
from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.families import get_family
from sa_diffusers.families.completion.networks import build_pixel_inpaint
from sa_diffusers.io.configuration import option
from sa_diffusers.io.processes import process_state
from sa_diffusers.runs.base.completion import CompletionConfig, HoleBatches, read_pictures
from sa_diffusers.runs.base.run_folder import told_by, train_pipeline


@dataclass
class PixelInpaintConfig(CompletionConfig):
    """Everything `sa-diffusers train-base` can be told of a model of pixels; holes may also be grey or coarse."""

    degradations: ClassVar[tuple[str, ...]] = DEGRADATIONS[1:]
    family: Literal["pixel_inpaint"] = option("pixel_inpaint", "What to train.")
    block_out_channels: list[int] = option(
        [32, 64, 64], "Width of each stage; every stage but the last halves the picture.", above=0
    )
    layers_per_block: int = option(1, "Residual blocks of each stage.", above=0)
    norm_num_groups: int = option(8, "Groups of the normalisation.", above=0)
    num_train_timesteps: int = option(1000, "T, the steps of the diffusion; beta goes from 1e-4 to 0.02.", above=1)
    prediction_type: Literal["epsilon", "v_prediction"] = option("v_prediction", "What the network predicts.")


def train_pixel_inpaint(config: PixelInpaintConfig) -> DiffusionPipeline:
    """As `train_masked_autoencoder`."""
    data = read_pictures(config)
    pipeline = build_pixel_inpaint(config, data.images.shape[1], config.seed)
    family = get_family(pipeline.to(process_state().device))
    batches = HoleBatches(family, data, config)
    pictures = told_by(len(data), data.images.__getitem__)
    return train_pipeline(family, Likelihood(family.loss), batches, config, pictures, description="pixel model")
