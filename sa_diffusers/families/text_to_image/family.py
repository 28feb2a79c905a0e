"""What pipelines share that draw the latents of a VAE by what text encoders make of a prompt."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from torch import Generator, Tensor, nn
from transformers import PreTrainedTokenizerBase

from sa_diffusers.core.batches import Batch, cat, map_tensors, to
from sa_diffusers.core.closed_form import ClosedFormEdit
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.losses import DiffusionLoss, Loss
from sa_diffusers.families.base import Configurations, Family
from sa_diffusers.families.requirements import pixels_a_latent
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.families.scopes import adapted_layers, is_text_map, text_maps
from sa_diffusers.io.hub import read_part
from sa_diffusers.models.precision import autocast_forward, on_device


PIXELS_AT_ONCE = 2**20  # that the VAE takes; four pictures of 512 x 512 need 3.2 GB beside the UNet in float32


class TextToImageFamily(Family):
    """The trained part is trained in place; everything else stays as it is. The safety checker is never run.

    What a prompt is encoded as is a batch: all that the trained part takes besides latents and a time. Only
    deterministic samplers (see `make_scheduler`) make an image a function of its seed alone.
    """

    capabilities = frozenset(("text", "guidance", "denoising", "text_maps", "token_embedding", "adapters"))
    stock: ClassVar[type[DiffusionPipeline]]  # the class that draws
    readers: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}  # parts that read a prompt
    limits: ClassVar[Mapping[str, int]] = {}  # tokens of a prompt, by tokenizers that read other than the first does
    sequence: ClassVar[tuple[str, ...]] = ("tokenizer",)  # whose tokens' embeddings stand one after the other
    latent_pixels = property(lambda self: self.pipeline.vae_scale_factor)  # in its height

    def set_up_drawing(self, sampler: str | None) -> None:
        self.sampler = make_scheduler(sampler or self.defaults.get("sampler", "dpmsolver++"), self.pipeline.scheduler)
        self._encoded: dict[str, Batch] = {}
        self._drawing = self.drawing_pipeline(self.stock)

    def make_loss(self) -> Loss:
        schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        return DiffusionLoss(schedule.alphas_cumprod, schedule.config.prediction_type)

    def encode_prompts(self, prompts: Sequence[str]) -> Batch:
        """What the text encoders make of prompts, on the model's device, where they are by now; gradients pass."""
        raise NotImplementedError

    def drawing_pipeline(self, cls: type[DiffusionPipeline], **options: Any) -> DiffusionPipeline:
        """One that takes embeddings and returns latents: with other parts it would compute where the first of them
        is, and cast embeddings to the precision of a text encoder."""
        parts = [name for name, one in inspect.signature(cls).parameters.items() if one.default is one.empty]
        drawing = cls(**dict.fromkeys(parts) | {self.component: self.module, "scheduler": self.sampler}, **options)
        drawing.vae_scale_factor = self.pipeline.vae_scale_factor
        drawing.set_progress_bar_config(disable=True)
        return drawing

    @property
    def resolution(self) -> int:
        """Height and width, in pixels, that the model was trained for."""
        return self.latent_shape[-1] * self.latent_pixels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        size = self.module.config.get("sample_size") or self.pipeline.vae.config.sample_size // self.latent_pixels
        return self.module.config.in_channels, size, size

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [part for name in self.readers.values() if (part := getattr(self.pipeline, name)) is not None]

    def text_readers(self) -> list[tuple[PreTrainedTokenizerBase, nn.Module, int, tuple[list[int], ...]]]:
        """Every tokenizer with its text encoder, the tokens that are read, and what `frame` says."""
        parts = self.pipeline.components
        readers = [(parts[name], parts[encoder], self.tokens_read(name)) for name, encoder in self.readers.items()]
        return [(*reader, self.frame(reader[0])) for reader in readers if reader[1] is not None]

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], ...]:
        """Ids of the tokens that stand before and after those of a prompt."""
        special = tokenizer("").input_ids
        return ([], special) if special[0] == tokenizer.eos_token_id else (special[:1], special[1:])

    def tokens_read(self, tokenizer: str) -> int:
        """Of a prompt, by the tokenizer of this name."""
        if tokenizer not in self.limits:
            return self.pipeline.tokenizer.model_max_length
        own = getattr(getattr(self.pipeline, tokenizer), "model_max_length", math.inf)  # an absent one's are zeros
        return min(self.limits[tokenizer], own)

    def embed(self, prompts: Sequence[str]) -> Batch:
        """What the model is told of prompts, on the CPU; each distinct one is encoded once (encoders are frozen), and
        kept.

        The empty prompt is what guidance leads away from.
        """
        self._encode(prompts)
        return cat([self._encoded[prompt] for prompt in prompts])

    def prepare(self, conditions: Sequence[Condition]) -> None:
        self._encode(texts(conditions))

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that have not been yet, one by one: a kernel is chosen by the shape of what it is given,
        and a prompt's embedding must not depend on which others were encoded before, as after resuming."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        with self.encoders_at_hand() if new else nullcontext():
            self._encoded |= {prompt: to(self.encode_prompts([prompt]), "cpu") for prompt in new}

    @contextmanager
    def encoders_at_hand(self) -> Iterator[None]:
        """The text encoders on the model's device within the block."""
        with ExitStack() as moved:
            for encoder in self.text_encoders:
                moved.enter_context(on_device(encoder, self.device))
            yield

    def draw(
        self,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        embedded = self.embed(texts(conditions))
        return self.draw_embedded(embedded, seeds, guidance_scale, num_inference_steps, negative)

    def draw_embedded(
        self,
        embedded: Batch,
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        """`draw` for what `embed` gives in place of conditions, such as that of no words at all."""
        avoided = self.embed(texts(negative) if negative else [""] * len(seeds))
        options = self.drawing_options(guidance_scale, num_inference_steps)
        return self._draw(embedded, avoided, seeds, num_inference_steps, **options)

    @torch.no_grad()
    def _draw(
        self, embedded: Batch, avoided: Batch, seeds: Sequence[int], num_inference_steps: int, **options: Any
    ) -> Tensor:
        with autocast_forward(self.module, self.compute_dtype):
            latents = self._drawing(
                **self._arguments(embedded),
                **self._arguments(avoided, "negative_"),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=num_inference_steps,
                height=self.resolution,
                width=self.resolution,
                output_type="latent",
                **options,
            ).images
        return latents.float().cpu()

    def told_guidance(self, guidance_scale: float) -> AbstractContextManager[None]:
        """Within the block a model that is told its guidance, as of distillation, is told this one by its loss."""
        return nullcontext()

    @staticmethod
    def text_parts(embedded: Batch) -> dict[str, Tensor]:
        """What a prompt is encoded as: "tokens" [B, L, D], and "pooled" [B, P] where the model also reads that."""
        pooled = embedded.get("pooled_projections", embedded.get("added_cond_kwargs", {}).get("text_embeds"))
        return {"tokens": embedded["encoder_hidden_states"]} | ({} if pooled is None else {"pooled": pooled})

    def _arguments(self, embedded: Batch, prefix: str = "") -> dict[str, Tensor]:
        """What a pipeline's call takes for an encoded prompt, in the precision of the weights, not of the encoders."""
        named = {"tokens": f"{prefix}prompt_embeds", "pooled": f"{prefix}pooled_prompt_embeds"}
        found = self.text_parts(embedded).items()
        return {named[part]: tensor.to(self.device, self.module.dtype) for part, tensor in found}

    def drawing_options(self, guidance_scale: float, num_inference_steps: int) -> dict[str, Any]:
        """What it is called with besides."""
        return {"guidance_scale": guidance_scale}

    def _affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """shift and scale of latents, (z - shift) * scale of what the VAE encodes."""
        config = self.pipeline.vae.config
        mean, std = (config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, config.scaling_factor
        mean, std = (torch.tensor(values).to(like).view(1, -1, 1, 1) for values in (mean, std))
        return mean, config.scaling_factor / std

    @contextmanager
    def _vae(self) -> Iterator[nn.Module]:
        with on_device(self.pipeline.vae, self.device) as vae:
            yield vae

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = self._affine(latents)
        parts = (latents / scale + shift).split(self._images_at_once(self.latent_pixels**2 * latents[0, 0].numel()))
        with self._vae() as vae:
            moved = (part.to(vae.device, vae.dtype) for part in parts)
            return torch.cat([vae.decode(part).sample.float().clamp(-1, 1).cpu() for part in moved])

    @torch.no_grad()
    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        parts = images.split(self._images_at_once(images.shape[-2:].numel()))
        with self._vae() as vae:
            found = [vae.encode(part.to(vae.device, vae.dtype)) for part in parts]
        if hasattr(found[0], "latent_dist"):
            mean, std = (torch.cat([getattr(part.latent_dist, name) for part in found]) for name in ("mean", "std"))
            latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        else:  # a tiny autoencoder, which has no posterior
            latents = torch.cat([part.latents for part in found])
        shift, scale = self._affine(latents)
        return ((latents - shift) * scale).float().cpu()

    @staticmethod
    def _images_at_once(pixels: int) -> int:
        return max(1, PIXELS_AT_ONCE // pixels)

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents} | map_tensors(self.embed(texts(conditions)), Tensor.float)

    @classmethod
    def parts(cls, configurations: Configurations) -> dict[str, Mapping[str, Any]]:
        """The configurations of all that it takes to draw. Raises ValueError where a part is missing."""
        names = [*cls.readers, *cls.readers.values(), cls.component, "vae", "scheduler"]
        parts = {part: configurations(part) for part in names}
        absent = [name for name, part in parts.items() if part["_class_name"] is None and name not in cls.optional]
        if absent:
            raise ValueError(f"the pipeline has no {' and no '.join(absent)}; load it with all of its components")
        return parts

    @classmethod
    def resolution_of(cls, source: str) -> int | None:
        size, vae = read_part(source, cls.component).get("sample_size"), read_part(source, "vae")
        return size * pixels_a_latent(vae) if isinstance(size, int) else vae.get("sample_size")

    def reads_text(self, name: str) -> str | None:
        """Which part of a text, "tokens" or "pooled", a weight or layer of this name reads as it is."""
        name = name.removesuffix(".weight")
        return next((part for part, layers in self.text_layers().items() if name in layers), None)

    def text_layers(self) -> dict[str, list[str]]:
        """Names of the layers that read a text's embeddings as they are, by what they read of it: a UNet's."""
        return {"tokens": [name for name, _ in self.module.named_modules() if is_text_map(name)]}

    def text_maps(self) -> dict[str, dict[str, nn.Linear]]:
        """Those layers. Raises ValueError as `scopes.text_maps`."""
        return {part: text_maps(self.module, names) for part, names in self.text_layers().items()}

    def edit(self, edits: Mapping[str, ClosedFormEdit]) -> None:
        """Edit those layers in place, by what they read. Raises ValueError as `ClosedFormEdit.check` does, before."""
        maps = self.text_maps()
        for part, edit in edits.items():
            edit.check(maps[part])
        for part, edit in edits.items():
            edit.apply(maps[part])

    def last_words(self, prompt: str) -> list[tuple[int, int]]:
        """Where a prompt's last word begins among the tokens' embeddings, and where what follows it ends: a pair for
        each that reads them. Of an empty prompt the start token, or what there is in its place."""
        found, start = [], 0
        convert = getattr(self.pipeline, "maybe_convert_prompt", lambda text, _: text)  # as `encode_prompts` does
        for name in self.sequence:
            tokenizer, length = getattr(self.pipeline, name), self.tokens_read(name)
            if tokenizer is None:
                continue
            before, after = self.frame(tokenizer)
            options = {"add_special_tokens": False, "truncation": True, "max_length": length}
            said = tokenizer(convert(prompt, tokenizer), **options).input_ids
            found.append((start + max(0, min(len(before) + len(said), length - len(after)) - 1), start + length))
            start += length
        return found

    def adapted_layers(self, scope: str, targets: str) -> list[str]:
        """Names of the layers that get an adapter, see `scopes.adapted_layers`."""
        return adapted_layers(self.module, scope, targets, self.scopes)

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write an adapter as diffusers' `load_lora_weights` reads it; `metadata` is peft's configuration of it."""
        said = {f"{self.component}_lora_layers": tensors, f"{self.component}_lora_adapter_metadata": metadata}
        self.pipeline.save_lora_weights(folder, **said)

    def lora_for_others(self, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """An adapter in float16 by names that other programs read: of UNets kohya's, that ComfyUI and A1111 know."""
        found = convert_state_dict_to_kohya({f"unet.{name}": tensor.half() for name, tensor in tensors.items()})
        # diffusers takes every alpha for the rank.
        return {name: torch.tensor(float(alpha)).half() if name.endswith(".alpha") else t for name, t in found.items()}
