"""Which weights are trained, as the authors named it (their `train_method`, taken over from ESD).

Names are matched by path component, never by substring: "attn2" is a component of
"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight".
"""

from typing import Literal, get_args

from torch import nn


Scope = Literal["full", "xattn", "xattn-strict", "noxattn"]

# In the CompVis UNet: "out." (the final norm and convolution) and "time_embed" (the timestep's MLP). The resnets' own
# projections of the time embedding (time_emb_proj) and the output projections of attention (to_out) stay trainable.
_OUTSIDE_NOXATTN = ("conv_norm_out", "conv_out", "time_embedding")


def select_parameters(module: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """The parameters of a UNet that `scope` trains, by name.

    - full: all of them.
    - xattn: cross-attention, where the text enters. For concepts that a prompt names, such as a person.
    - xattn-strict: the keys and values of cross-attention alone, as ESD's later code has it.
    - noxattn: all but cross-attention, the final norm and convolution, and the timestep's MLP. For concepts that
      appear without being named, such as nudity.

    Raises:
        ValueError: an unknown scope, or one that selects nothing in this module.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"expected train_scope to be one of {', '.join(get_args(Scope))}, got {scope!r}")
    selected = {name: p for name, p in module.named_parameters() if _inside(name.split("."), scope)}
    if not selected:
        raise ValueError(
            f"train_scope {scope!r} selects no weight of {type(module).__name__}: it has no cross-attention"
        )
    return selected


def _inside(path: list[str], scope: str) -> bool:
    if scope == "xattn":
        return "attn2" in path
    if scope == "xattn-strict":
        return "attn2" in path and not {"to_k", "to_v"}.isdisjoint(path)
    if scope == "noxattn":
        return "attn2" not in path and path[0] not in _OUTSIDE_NOXATTN
    return True
