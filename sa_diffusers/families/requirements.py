"""What the parts of a text-to-image pipeline must be, by their configurations: anything else is refused unloaded."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers


Config = Mapping[str, Any]
FLOW = "FlowMatchEulerDiscreteScheduler"

# What a UNet takes besides noisy latents, a timestep and a text: by property, with the values that ask for nothing.
TAKES_MORE = {
    "time_cond_proj_dim": ((None,), "is told the guidance scale, as those of latent consistency models"),
    "addition_embed_type": ((None, "text"), "is told more than a prompt, as SDXL's"),
    "class_embed_type": ((None,), "is told a class"),
    "num_class_embeds": ((None,), "is told a class"),
    "encoder_hid_dim_type": ((None, "text_proj"), "is shown pictures; pipeline.unload_ip_adapter() takes that away"),
}


def check_parts(unet: Config, vae: Config, scheduler: Config, width: int | None, told: str | None = None) -> None:
    """Raise ValueError for the first property under which loss, sampler or embeddings would not be the pipeline's.

    Args:
        width: of the tokens' embeddings; None: not known.
        told: the addition_embed_type of a UNet that must be told more than a prompt.
    """
    if told and unet.get("addition_embed_type") != told:
        kind = unet.get("addition_embed_type")
        raise ValueError(f"the pipeline's UNet has addition_embed_type {kind!r}, expected {told!r}, as its class has")
    takes = TAKES_MORE | ({"addition_embed_type": ((told,), "")} if told else {})
    for fault in (*_unet_faults(unet, vae, width, takes), *_schedule_faults(scheduler)):
        raise ValueError(f"the pipeline's {fault}")


def check_flow(transformer: Config, vae: Config, scheduler: Config, widths: Config, channels: int) -> None:
    """The same of a transformer that predicts a velocity.

    Args:
        widths: what the text encoders make for each property of the transformer; None: not known.
        channels: of what it takes and makes for each of the VAE's.
    """
    expected = {"in_channels": channels * vae.get("latent_channels", 4)} | widths
    for name, size in expected.items():
        if size is not None and transformer.get(name, size) != size:
            raise ValueError(
                f"the pipeline's transformer has {name} {transformer[name]}, expected {size}, as its VAE and text "
                "encoders make: models that edit or fill also take pictures"
            )
    kind, inverted = scheduler.get("_class_name"), scheduler.get("invert_sigmas")
    if kind != FLOW or inverted:
        raise ValueError(
            f"the pipeline's scheduler is a {kind}{', inverted' * bool(inverted)}; expected the {FLOW} that it was "
            "trained with"
        )


def pixels_a_latent(vae: Config) -> int:
    """How often the VAE halves pictures, as a factor of their height."""
    return 2 ** (len(vae.get("block_out_channels", (64,))) - 1)


def _unet_faults(unet: Config, vae: Config, width: int | None, takes_more: Mapping) -> Iterator[str]:
    for name, (fine, takes) in takes_more.items():
        if unet.get(name) not in fine:
            yield f"UNet has {name} {unet[name]!r}, so it {takes}; expected one that draws by a prompt alone"
    latents, size = vae.get("latent_channels", 4), unet.get("sample_size")
    reasons = {
        "in_channels": "inpainting and editing models also take pictures",
        "out_channels": "models with a learned variance predict more than the noise",
    }
    for name, reason in reasons.items():
        if unet.get(name, 4) != latents:
            yield f"UNet has {name} {unet[name]}, expected {latents}, as the VAE's latents have: {reason}"
    if type(size) is not int:
        yield f"UNet has sample_size {size!r}, expected the height of square latents, such as 64, in its config.json"
    elif size * pixels_a_latent(vae) % 8:
        pixels = size * pixels_a_latent(vae)
        yield f"UNet has sample_size {size}, so it draws {pixels} pixels a side; diffusers draws multiples of 8"
    reads = unet.get("cross_attention_dim")
    if isinstance(reads, int) and width not in (None, reads) and unet.get("encoder_hid_dim") is None:
        yield f"UNet has cross_attention_dim {reads}, but the text encoder's embeddings have hidden_size {width}"


def _schedule_faults(scheduler: Config) -> Iterator[str]:
    name, predicts = scheduler.get("_class_name", ""), scheduler.get("prediction_type", "epsilon")
    cls = getattr(diffusers, name, None)
    # Its configuration may still hold what another class, that it was made from, takes.
    takes = inspect.signature(cls.__init__).parameters if isinstance(cls, type) else scheduler
    if "beta_start" not in takes or ("use_flow_sigmas" in takes and scheduler.get("use_flow_sigmas")):
        why = "use_flow_sigmas" if "beta_start" in takes else "no betas"
        yield f"scheduler, a {name}, has {why}; expected the one it was trained with, such as a DDIMScheduler"
    if predicts not in ("epsilon", "v_prediction"):
        yield f"scheduler has prediction_type {predicts!r}, expected epsilon or v_prediction"
