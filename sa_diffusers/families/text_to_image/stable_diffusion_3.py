"""Stable Diffusion 3: a transformer over pictures and the tokens of two CLIP encoders and, where it has one, T5."""

from collections.abc import Sequence

from diffusers import StableDiffusion3Pipeline

from sa_diffusers.core.batches import Batch
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.requirements import check_flow
from sa_diffusers.families.text_to_image.flows import FlowFamily
from sa_diffusers.families.text_to_image.safely_guided import SafelyGuidedFamily
from sa_diffusers.pipelines.safely_guided import SafeGuidanceSD3Pipeline


@register
class StableDiffusion3Family(SafelyGuidedFamily, FlowFamily):
    """Adapter of a StableDiffusion3Pipeline, with T5 or without."""

    name = "stable_diffusion_3"
    pipelines = ("StableDiffusion3Pipeline", "SafeGuidanceSD3Pipeline")
    own_classes = (SafeGuidanceSD3Pipeline,)
    stock = StableDiffusion3Pipeline
    readers = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"}
    limits, sequence = {"tokenizer_3": 256}, ("tokenizer", "tokenizer_3")
    optional = ("tokenizer_3", "text_encoder_3")
    helpers = (*readers.values(), "vae", "image_encoder")
    defaults = FlowFamily.defaults | {"guidance_scale": 7.0}

    def encode_prompts(self, prompts: Sequence[str]) -> Batch:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens_read("tokenizer_3"),
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        parts = cls.parts(configurations)
        pooled = [parts[name].get("projection_dim") for name in ("text_encoder", "text_encoder_2")]
        widths = {"joint_attention_dim": parts["text_encoder_3"].get("d_model")}
        widths |= {"pooled_projection_dim": None if None in pooled else sum(pooled)}
        check_flow(parts["transformer"], parts["vae"], parts["scheduler"], widths, channels=1)
