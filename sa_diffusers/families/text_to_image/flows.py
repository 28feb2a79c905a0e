"""What transformers share that draw by a velocity, and read a text as tokens and, most of them, a pooled vector."""

from collections.abc import Callable, Mapping
from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sa_diffusers.core.losses import FlowMatchingLoss
from sa_diffusers.families.text_to_image.family import TextToImageFamily


POOLED = {"text_embedder"}  # by components of a weight's name, as all below
KEYS_AND_VALUES = {"add_k_proj", "add_v_proj"}
CONTEXT = KEYS_AND_VALUES | {
    "context_embedder", "norm1_context", "norm2_context", "add_q_proj", "norm_added_q", "norm_added_k", "to_add_out",
    "ff_context", "double_stream_modulation_txt",
}  # fmt: skip
OUTSIDE = {"timestep_embedder", "guidance_embedder", "norm_out"}


def _within(parts: set[str], name: str) -> bool:
    return not parts.isdisjoint(name.split("."))


def _neither(name: str) -> bool:
    return not _within(CONTEXT | POOLED | OUTSIDE, name) and not name.startswith("proj_out.")


class FlowFamily(TextToImageFamily):
    """The model may read a concept from its pooled vector alone, which is why that is a part of what text enters by.

    - xattn: the stream of text beside that of the picture, from the tokens' embeddings on, and the pooled vector.
    - xattn-strict: its keys and values alone, and the pooled vector.
    - pooled: what reads the pooled vector.
    - noxattn: all but the first, the output, and what time and guidance enter by.
    """

    component = "transformer"
    scopes: dict[str, Callable[[str], bool]] = {
        "full": lambda name: True,
        "xattn": partial(_within, CONTEXT | POOLED),
        "xattn-strict": partial(_within, KEYS_AND_VALUES | POOLED),
        "noxattn": _neither,
        "pooled": partial(_within, POOLED),
    }
    defaults = {"sampler": "pipeline", "num_inference_steps": 28, "lora_targets": "attention+conditioning"}
    loss_class = FlowMatchingLoss

    def make_loss(self) -> FlowMatchingLoss:
        """On the grid of the training scripts: shifted as the scheduler says, but for shifts by the picture's size."""
        schedule = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        shift = 1.0 if schedule.config.use_dynamic_shifting else schedule.config.shift
        return self.loss_class(schedule.sigmas.flip(0), shift)

    def text_layers(self) -> dict[str, list[str]]:
        pooled = {"pooled": ["time_text_embed.text_embedder.linear_1"]} if "pooled" in self.scopes else {}
        return {"tokens": ["context_embedder"]} | pooled

    def lora_for_others(self, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """By diffusers' names, which ComfyUI reads, alpha / rank within B: kohya's are read for some layers only."""
        found = {}
        for name, tensor in tensors.items():
            scale = alpha / tensor.shape[1] if ".lora_B." in name else 1.0
            found[f"{self.component}.{name}"] = (tensor.float() * scale).half()
        return found
