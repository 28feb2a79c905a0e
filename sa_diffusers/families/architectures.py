"""Pipelines made of an architecture, with random weights: nothing is fetched, and meta tensors will do."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Regex, normalizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.families.samplers import pixel_schedule
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import (
    ClassConditionalPipeline,
    ConditionalVAEPipeline,
    MaskedAutoencoderInpaintPipeline,
)


ZEROS = 2  # tokens, the fewest that a tokenizer can cut a prompt to


def missing_parts(architecture: Mapping[str, Any]) -> list[str]:
    """The parts that `build_text_to_image`, and who trains what it is built around, need and that are not there."""
    denoiser = "transformer" if "transformer" in architecture else "unet"
    return sorted({"vae", "text_encoder", "scheduler", denoiser} - architecture.keys())


def build_text_to_image(
    architecture: Mapping[str, dict[str, Any]],
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    seed: int,
) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """A small Stable Diffusion around trained parts; `architecture` configures the new ones, "unet" and "scheduler".

    With a "transformer" in place of the UNet it is a Stable Diffusion 3.

    Args:
        seed: of the weights, here and below; the global generator is set from it.
    """
    if "transformer" in architecture:
        return _stable_diffusion_3(architecture, vae, text_encoder, tokenizer, seed)
    torch.manual_seed(derive_seed(seed, "unet"))
    unet, scheduler = UNet2DConditionModel(**architecture["unet"]), DDIMScheduler(**architecture["scheduler"])
    parts = vae, text_encoder, tokenizer, unet, scheduler
    return StableDiffusionPipeline(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _stable_diffusion_3(
    architecture: Mapping[str, dict[str, Any]],
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    seed: int,
) -> StableDiffusion3Pipeline:
    """One whose CLIP encoders are the same, and whose T5, without which diffusers would not load it, says zeros.

    Of zeros it reads but ZEROS tokens, since the usual 256 take six times as long; a stock pipeline is called with
    max_sequence_length=ZEROS. It reads the layer before the last, so that the encoder gets one more layer, which
    changes nothing.
    """
    vae.register_to_config(shift_factor=0.0)
    torch.manual_seed(derive_seed(seed, "transformer"))
    transformer = SD3Transformer2DModel(**architecture["transformer"])
    settings = text_encoder.config.to_dict()
    settings |= {"num_hidden_layers": settings["num_hidden_layers"] + 1, "projection_dim": settings["hidden_size"]}
    reader = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    reader.text_model.load_state_dict(text_encoder.state_dict(), strict=False)
    t5_sizes = {"d_kv": 1, "d_ff": 1, "num_layers": 1, "num_heads": 1}
    width = architecture["transformer"]["joint_attention_dim"]
    zeros = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, **t5_sizes))
    last = reader.text_model.encoder.layers[-1]
    with torch.no_grad():
        for layer in (last.self_attn.out_proj, last.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        for name, layer in transformer.named_modules():  # blocks begin by passing on what they are given
            if name.endswith((".norm1.linear", ".norm1_context.linear")) or name in ("norm_out.linear", "proj_out"):
                layer.weight.zero_()
                layer.bias.zero_()
        reader.text_projection.weight.copy_(torch.eye(settings["hidden_size"]))
        zeros.encoder.final_layer_norm.weight.zero_()
    scheduler = FlowMatchEulerDiscreteScheduler(**architecture["scheduler"])
    # It reads nothing of a text, so that diffusers does not report words which it would have cut off.
    deaf = copy.deepcopy(tokenizer.backend_tokenizer)
    deaf.normalizer = normalizers.Replace(Regex(r"(.|\n)+"), "")
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    few = PreTrainedTokenizerFast(tokenizer_object=deaf, model_max_length=ZEROS, **special)
    return StableDiffusion3Pipeline(
        transformer, scheduler, vae, reader, tokenizer, reader, tokenizer, zeros.eval(), few
    )


def make_unet(options: Any, image_size: int, channels: int, num_classes: int) -> UNet2DModel:
    """A UNet conditioned by FiLM on the sum of the embeddings of timestep and class; the last class is the null class.

    Args:
        options: of `ClassConditionalConfig`, those of its architecture.

    Raises:
        ValueError: images that cannot be halved that often, or attention at a resolution that no stage has.
    """
    count = len(options.block_out_channels)
    resolutions = [image_size // 2**stage for stage in range(count)]
    if image_size % 2 ** (count - 1):
        raise ValueError(f"images of {image_size} pixels cannot be halved {count - 1} times; pass fewer stages")
    absent = [size for size in options.attention_resolutions if size not in resolutions]
    if absent:
        raise ValueError(f"expected attention_resolutions among {resolutions}, got {absent[0]}")
    attends = [size in options.attention_resolutions for size in resolutions]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=options.layers_per_block,
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=options.attention_head_dim,
        norm_num_groups=options.norm_num_groups,
        norm_eps=1e-6,
        dropout=options.dropout,
        num_class_embeds=num_classes + 1,
        resnet_time_scale_shift="scale_shift",
    )


def build_class_conditional(
    options: Any, image_size: int, channels: int, names: Sequence[str], seed: int
) -> ClassConditionalPipeline:
    """Class-conditional diffusion on pixels, untrained; its noise schedule goes from beta 1e-4 to 0.02.

    Args:
        options: of `ClassConditionalConfig`, those of its architecture and its noise schedule.
        names: of the classes.

    Raises:
        ValueError: as `make_unet`.
    """
    torch.manual_seed(derive_seed(seed, "unet"))
    unet = make_unet(options, image_size, channels, len(names))
    return ClassConditionalPipeline(
        unet, pixel_schedule(options, options.beta_schedule, options.clip_sample), _id2label(names)
    )


def build_conditional_vae(
    hidden_sizes: Sequence[int], latent_dim: int, image_size: int, channels: int, names: Sequence[str], seed: int
) -> ConditionalVAEPipeline:
    """A conditional VAE, untrained, for classes of these names; see `ConditionalVAE`."""
    torch.manual_seed(derive_seed(seed, "vae"))
    vae = ConditionalVAE(image_size, channels, len(names), tuple(hidden_sizes), latent_dim)
    return ConditionalVAEPipeline(vae, _id2label(names))


def build_masked_autoencoder(options: Any, channels: int, seed: int) -> MaskedAutoencoderInpaintPipeline:
    """A masked autoencoder, untrained, that predicts pixels.

    Args:
        options: of `MaskedAutoencoderConfig`, those of its architecture.

    Raises:
        ValueError: patches that do not divide the pictures, or heads that do not divide the width.
    """
    size, patch = options.image_size, options.patch_size
    if size % patch or size // patch < 2:
        raise ValueError(f"expected a patch_size that divides image_size {size}, got {patch}")
    widths = options.hidden_size, options.decoder_hidden_size
    if any(width % (4 * options.num_heads) for width in widths):
        raise ValueError(f"expected widths that divide by 4 x {options.num_heads} heads, got {widths}")
    torch.manual_seed(derive_seed(seed, "mae"))
    config = ViTMAEConfig(
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        decoder_hidden_size=options.decoder_hidden_size,
        decoder_intermediate_size=2 * options.decoder_hidden_size,
        decoder_num_hidden_layers=options.decoder_num_layers,
        decoder_num_attention_heads=options.num_heads,
        initializer_range=options.initializer_range,
    )
    mae = ViTMAEForPreTraining(config)
    with (
        torch.no_grad()
    ):  # transformers leaves positions and the mask token at 0, from where they cannot be told apart
        for positions in (mae.vit.embeddings.position_embeddings, mae.decoder.decoder_pos_embed):
            positions[:, 1:] = sine_positions(size // patch, positions.shape[2])
        mae.decoder.mask_token.normal_(std=options.initializer_range)
    return MaskedAutoencoderInpaintPipeline(mae)


def sine_positions(rows: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, [rows^2, width], as of transformers (Vaswani et al. 2017, section 3.5)."""
    rates = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(rows)[:, None] * rates  # [rows, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([waves.repeat_interleave(rows, 0), waves.repeat(rows, 1)], 1)


def _id2label(names: Sequence[str]) -> dict[str, str]:
    """The names of the classes as pipelines store them."""
    return {str(index): name for index, name in enumerate(names)}
