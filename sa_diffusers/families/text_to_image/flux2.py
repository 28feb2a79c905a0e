"""FLUX.2 Klein: a transformer over patches of latents and what three layers of a language model make of a chat."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace as Parts
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.losses import FlowMatchingLoss
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.requirements import check_flow
from sa_diffusers.families.text_to_image.flows import FlowFamily


class Flux2Loss(FlowMatchingLoss):
    """Its model is told T s / 1000, and in four numbers where each token of text and picture stands."""

    def call(self, model: Callable, noisy: Tensor, times: Tensor, conditions: Batch) -> Tensor:
        predicted = model(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy),
            timestep=times / 1000,  # whatever T is, as the pipeline has it
            txt_ids=Flux2KleinPipeline._prepare_text_ids(conditions["encoder_hidden_states"][:1]).to(noisy.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy[:1]).to(noisy.device),
            **conditions,
        ).sample
        return predicted.transpose(1, 2).unflatten(2, noisy.shape[-2:])


@register
class Flux2Family(FlowFamily):
    """Adapter of a Flux2KleinPipeline. Its latents [B, C, h, w] are patches of 2 x 2, normalised, as its model has
    them, and it reads tokens alone. One distilled to few steps (`is_distilled`) draws without guidance, whatever is
    asked: it takes `--replay_negative none`, and few `--num_inference_steps`."""

    name, pipelines = "flux2", ("Flux2KleinPipeline",)
    stock, loss_class = Flux2KleinPipeline, Flux2Loss
    limits, helpers = {"tokenizer": 512}, ("text_encoder", "vae")
    scopes = {name: rule for name, rule in FlowFamily.scopes.items() if name != "pooled"}
    defaults = FlowFamily.defaults | {"guidance_scale": 4.0, "replay_guidance_scale": 4.0}
    guided = property(lambda self: not self.pipeline.config.is_distilled)
    guided_passes = property(lambda self: 1 + self.guided)
    latent_pixels = property(lambda self: 2 * self.pipeline.vae_scale_factor)

    def _draw(self, *arguments: Any, **options: Any) -> Tensor:
        bn = Parts(running_mean=torch.zeros(1), running_var=torch.ones(1))  # with which latents stay normalised
        self._drawing.vae = Parts(bn=bn, config=Parts(batch_norm_eps=0.0))
        options |= {} if self.guided else {"guidance_scale": 1.0}
        return Flux2KleinPipeline._patchify_latents(super()._draw(*arguments, **options))

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        bn, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        return bn.running_mean.to(like).view(1, -1, 1, 1), (bn.running_var + eps).rsqrt().to(like).view(1, -1, 1, 1)

    @contextmanager
    def _vae(self) -> Iterator[Parts]:
        """Of patches, which it encodes as the mode of its posterior."""
        to, back = Flux2KleinPipeline._patchify_latents, Flux2KleinPipeline._unpatchify_latents
        with super()._vae() as vae:
            encode, decode = lambda x: Parts(latents=to(vae.encode(x).latent_dist.mean)), lambda z: vae.decode(back(z))
            yield Parts(encode=encode, decode=decode, device=vae.device, dtype=vae.dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Batch:
        options = {"device": self.device, "max_sequence_length": self.tokens_read("tokenizer")}
        return {"encoder_hidden_states": self.pipeline.encode_prompt(list(prompts), **options)[0]}

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], ...]:
        turn = [{"role": "user", "content": "{}"}]
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return tuple(tokenizer(part).input_ids for part in chat.split("{}"))

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        parts = cls.parts(configurations)
        width = 3 * parts["text_encoder"].get("hidden_size", 0) or None  # of three layers
        check_flow(parts["transformer"], parts["vae"], parts["scheduler"], {"joint_attention_dim": width}, channels=4)
