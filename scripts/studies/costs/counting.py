"""Operations and bytes of a module without running it: on meta tensors, which have shapes and no values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sa_diffusers.models.memory import TensorBytes


TOKENS = 77
TOKENS_T5 = {False: 77 + 256, True: 512}  # of Stable Diffusion 3, with CLIP's, and of FLUX
# What CUDA's autocast does, of what a UNet calls: these in half precision, those in float32, all else as it comes.
HALF = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum}
FULL = {F.group_norm, F.layer_norm, F.softmax, F.mse_loss, F.interpolate}


class CudaKernels(TorchFunctionMode):
    """Within the block meta tensors are treated as a GPU would: attention is fused, and precisions are autocast.

    Attention then keeps its inputs, its output and a number a row, never the [tokens, tokens] products, as on a GPU of
    any recent kind. The copies of trained weights in half precision live as long as the forward pass, as in autocast.

    Args:
        dtype: of autocast; None: everything stays in the dtype of the weights.
    """

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.dtype is not None and function in HALF | FULL:
            dtype = self.dtype if function in HALF else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {key: self._cast(value, dtype) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        if attn_mask is not None:
            raise ValueError("expected attention without a mask, as in the UNet of Stable Diffusion")
        if self.dtype is None:
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        query, key, value = (self._cast(tensor, self.dtype) for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (isinstance(value, nn.Parameter) and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]


def unet_inputs(denoiser: UNet2DConditionModel, batch_size: int, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Meta tensors: latents [B, C, size, size], timesteps [B], text embeddings [B, 77, D]."""
    with torch.device("meta"):
        return (
            torch.empty(batch_size, denoiser.config.in_channels, size, size),
            torch.zeros(batch_size, dtype=torch.long),
            torch.empty(batch_size, TOKENS, denoiser.config.cross_attention_dim),
        )


def inputs_of(denoiser: nn.Module, batch_size: int, size: int) -> dict[str, Any]:
    """What a UNet, or a transformer of Stable Diffusion 3 or FLUX, is called with: meta tensors by name.

    Args:
        size: height and width of the latents.
    """
    config = denoiser.config
    if "joint_attention_dim" not in config:
        found = dict(
            zip(("sample", "timestep", "encoder_hidden_states"), unet_inputs(denoiser, batch_size, size), strict=True)
        )
        if config.addition_embed_type:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            shapes = {"text_embeds": pooled, "time_ids": 6}
            added = {name: torch.empty(batch_size, width, device="meta") for name, width in shapes.items()}
            found["added_cond_kwargs"] = added
        return found
    packed, (height, width) = "guidance_embeds" in config, (size // 2, size // 2)
    latents = (height * width,) if packed else (size, size)
    with torch.device("meta"):
        found = {
            "hidden_states": torch.empty(batch_size, *latents, config.in_channels)
            if packed
            else torch.empty(batch_size, config.in_channels, *latents),
            "timestep": torch.empty(batch_size),
            "encoder_hidden_states": torch.empty(batch_size, TOKENS_T5[packed], config.joint_attention_dim),
            "pooled_projections": torch.empty(batch_size, config.pooled_projection_dim),
        }
        if packed:
            found |= {"img_ids": torch.empty(*latents, 3), "txt_ids": torch.empty(TOKENS_T5[packed], 3)}
            found["guidance"] = torch.empty(batch_size)
    return found


def forward_flops(denoiser: nn.Module, size: int = 64) -> int:
    """Floating point operations of a forward pass of one sample, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(**inputs_of(denoiser, 1, size))
    return counter.get_total_flops()


def vae_latents(vae: AutoencoderKL, batch_size: int, size: int = 64) -> Tensor:
    """Meta tensor [B, C, size, size]."""
    return torch.empty(batch_size, vae.config.latent_channels, size, size, device="meta", dtype=vae.dtype)


def decoding_flops(vae: AutoencoderKL, size: int = 64) -> int:
    """Floating point operations of decoding one sample."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(vae_latents(vae, 1, size))
    return counter.get_total_flops()


def decoding_bytes(vae: AutoencoderKL, batch_size: int, size: int = 64) -> int:
    """The most that decoding holds beside the weights, in their precision; the VAE is on "meta"."""
    with torch.no_grad(), TensorBytes() as counter, CudaKernels(None):
        vae.requires_grad_(False).decode(vae_latents(vae, batch_size, size))
    return counter.peak


def weight_bytes(module: nn.Module, trained_only: bool = False) -> int:
    """Bytes of a module's weights."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained_only)


def step_bytes(
    denoiser: nn.Module, batch_size: int, dtype: torch.dtype | None, checkpointing: bool, size: int = 64
) -> int:
    """The most that a forward and a backward pass hold beside the weights: activations, copies of weights, gradients.

    Args:
        denoiser: on "meta", its gradients None; trained are the weights that require a gradient.
        batch_size: surrogate and replay samples together.
        dtype: of autocast; None: none.
    """
    inputs = inputs_of(denoiser, batch_size, size)
    with _checkpointing(denoiser, dtype) if checkpointing else nullcontext(), TensorBytes() as counter:
        with CudaKernels(dtype):
            loss = denoiser(**inputs).sample.float().square().mean()
        loss.backward()
    denoiser.zero_grad()
    return counter.peak


def forward_bytes(denoiser: nn.Module, batch_size: int, dtype: torch.dtype | None, size: int = 64) -> int:
    """The most that a forward pass without gradients holds beside the weights; arguments as of `step_bytes`."""
    inputs = inputs_of(denoiser, batch_size, size)
    with torch.no_grad(), TensorBytes() as counter, CudaKernels(dtype):
        denoiser.requires_grad_(False)(**inputs)
    return counter.peak


@contextmanager
def _checkpointing(denoiser: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Checkpoint the UNet's blocks; while a block is computed again, autocast is on again."""

    def run_checkpointed(block: nn.Module, *inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            with CudaKernels(dtype):
                return block(*values)

        return checkpoint(run, *inputs, use_reentrant=False)

    training = denoiser.training
    denoiser.train().enable_gradient_checkpointing(run_checkpointed)
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()
        denoiser.train(training)
