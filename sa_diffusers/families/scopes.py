"""Which weights of a UNet with cross-attention are trained, as the authors named it (their `train_method`, of ESD).

Names are matched by path component, never by substring: "attn2" is a component of
"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight".
"""

from collections.abc import Iterable

from torch import nn

from sa_diffusers.families.base import Scopes, select_parameters


# In the CompVis UNet: "out." (the final norm and convolution) and "time_embed" (the timestep's MLP). The resnets' own
# projections of the time embedding (time_emb_proj) and the output projections of attention (to_out) stay trainable.
_OUTSIDE_NOXATTN = ("conv_norm_out", "conv_out", "time_embedding")

# - full: all of them.
# - xattn: cross-attention, where the text enters. For concepts that a prompt names, such as a person.
# - xattn-strict: the keys and values of cross-attention alone, as ESD's later code has it.
# - noxattn: all but cross-attention, the final norm and convolution, and the timestep's MLP. For concepts that appear
#   without being named, such as nudity.
SCOPES = {
    "full": lambda name: True,
    "xattn": lambda name: "attn2" in name.split("."),
    "xattn-strict": lambda name: is_text_map(name.rpartition(".")[0]),
    "noxattn": lambda name: "attn2" not in name.split(".") and name.split(".")[0] not in _OUTSIDE_NOXATTN,
}


def is_text_map(name: str) -> bool:
    """Whether a layer makes keys or values of text, by its name in the UNet."""
    return name.split(".")[-2:] in (["attn2", "to_k"], ["attn2", "to_v"])


def text_maps(module: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Linear]:
    """The layers that read a text as it is, by name; None: those that make keys and values of it in a UNet.

    Raises:
        ValueError: there are none, or no linear ones.
    """
    names = [name for name, _ in module.named_modules() if is_text_map(name)] if names is None else names
    layers = {name: module.get_submodule(name) for name in names}
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no cross-attention (attn2) whose keys and values could be edited"
        )
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"expected a linear layer, got {name}, a {type(layer).__name__}; fuse or unload adapters first"
            )
    return layers


# Where a pooled text, time and guidance enter, directly or by modulating a block: in UNets the first two.
CONDITIONING = {"add_embedding", "time_emb_proj", "text_embedder", "context_embedder"} | {
    "norm", "norm1", "norm1_context", "norm_out",
    "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
}  # fmt: skip


def adapted_layers(module: nn.Module, scope: str, targets: str, scopes: Scopes = SCOPES) -> list[str]:
    """Names of the layers that get an adapter.

    Args:
        scope: of `scopes`, as of full fine-tuning: only layers whose weight it trains.
        targets: "attention", its projections; "attention+conv", convolutions besides; or "attention+conditioning",
            what the text enters by outside of attention.

    Raises:
        ValueError: nothing is left.
    """
    inside = select_parameters(module, scope, scopes)
    linear = {"attn", "attn1", "attn2"} | (CONDITIONING if targets == "attention+conditioning" else set())
    names = []
    for name, layer in module.named_modules():
        chosen = isinstance(layer, nn.Linear) and not linear.isdisjoint(name.split("."))
        convolution = isinstance(layer, nn.Conv2d) and targets == "attention+conv"
        if (chosen or convolution) and f"{name}.weight" in inside:
            names.append(name)
    if not names:
        raise ValueError(f"lora_targets {targets!r} and train_scope {scope!r} leave no layer to adapt")
    return names
