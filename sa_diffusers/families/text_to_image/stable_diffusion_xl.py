"""Stable Diffusion XL: a UNet that reads the tokens of two text encoders, a pooled text, and the picture's size."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.requirements import check_parts
from sa_diffusers.families.scopes import SCOPES
from sa_diffusers.families.text_to_image.safely_guided import SafelyGuidedFamily
from sa_diffusers.pipelines.safely_guided import SafeGuidanceXLPipeline


POOLED = "add_embedding"  # the part of the UNet that the pooled text and the sizes enter by


@register
class StableDiffusionXLFamily(SafelyGuidedFamily):
    """Adapter of a StableDiffusionXLPipeline; pictures are told to be whole and of the model's own size.

    The empty prompt is zeros where the pipeline says so (`force_zeros_for_empty_prompt`), as it is in guidance.
    """

    name = "stable_diffusion_xl"
    pipelines = ("StableDiffusionXLPipeline", "SafeGuidanceXLPipeline")
    own_classes = (SafeGuidanceXLPipeline,)
    stock = StableDiffusionXLPipeline
    component = "unet"
    readers = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    helpers = ("text_encoder", "text_encoder_2", "vae", "image_encoder")
    # Those of a UNet, with the pooled text among what a prompt enters by.
    scopes = {
        "full": SCOPES["full"],
        "xattn": lambda name: SCOPES["xattn"](name) or name.startswith(POOLED),
        "xattn-strict": lambda name: SCOPES["xattn-strict"](name) or name.startswith(POOLED),
        "noxattn": lambda name: SCOPES["noxattn"](name) and not name.startswith(POOLED),
        "pooled": lambda name: name.startswith(POOLED),
    }
    defaults = {"lora_targets": "attention+conditioning", "guidance_scale": 5.0}

    def encode_prompts(self, prompts: Sequence[str]) -> Batch:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        sizes = torch.tensor([self.resolution, self.resolution, 0, 0, self.resolution, self.resolution])
        added = {"text_embeds": pooled, "time_ids": sizes.to(pooled).expand(len(pooled), -1)}
        if self.pipeline.config.force_zeros_for_empty_prompt and "" in prompts:
            said = torch.tensor([prompt != "" for prompt in prompts], device=self.device)
            tokens, added["text_embeds"] = tokens * said[:, None, None], pooled * said[:, None]
        return {"encoder_hidden_states": tokens, "added_cond_kwargs": added}

    @contextmanager
    def _vae(self) -> Iterator[nn.Module]:
        """In float32 where its configuration says that it overflows in float16."""
        with super()._vae() as vae:
            if vae.dtype != torch.float16 or not vae.config.force_upcast:
                yield vae
                return
            try:
                yield vae.float()
            finally:
                vae.to(torch.float16)

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        parts = cls.parts(configurations)
        widths = [parts[name].get("hidden_size") for name in cls.readers.values()]
        width = None if None in widths else sum(widths)
        check_parts(parts["unet"], parts["vae"], parts["scheduler"], width, told="text_time")

    def text_maps(self) -> dict[str, dict[str, nn.Linear]]:
        """And of the layer that reads the pooled text beside sizes its part for the text, a view that edits change."""
        layer = self.module.get_submodule(f"{POOLED}.linear_1")
        width = self.pipeline.text_encoder_2.config.projection_dim
        view = nn.Linear(width, layer.out_features, bias=False, device="meta")
        view.weight = nn.Parameter(layer.weight.detach()[:, :width], requires_grad=False)
        return super().text_maps() | {"pooled": {f"{POOLED}.linear_1": view}}

    def lora_for_others(self, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        found = super().lora_for_others(tensors, alpha)
        for layer in (1, 2):  # which diffusers reads back by its original name alone
            ours, theirs = f"_add_embedding_linear_{layer}.", f"_label_emb_0_{2 * layer - 2}."
            found = {name.replace(ours, theirs): tensor for name, tensor in found.items()}
        return found
