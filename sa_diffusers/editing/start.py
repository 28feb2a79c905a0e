"""Training that starts at a closed-form edit instead of at the model as it is."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sa_diffusers.objectives import LowRankChange

from .uce import ClosedFormEdit, is_cross_attention_projection


@torch.no_grad()
def start_from_edit(
    module: nn.Module, weights: Mapping[str, nn.Parameter] | Mapping[str, LowRankChange], edit: ClosedFormEdit
) -> None:
    """Put what is trained where the edit would put it, in place; all that the edit leaves alone stays.

    Weights become W (I + M). Adapters of rank r take of the change N = W M what they can hold: the B A that minimises
    tr((N - B A) G (N - B A)^T), so that the keys and values of concept and preserved prompts are the nearest to the
    edit's (Eckart-Young, for N G^1/2). The rows of A are as long as those they replace, and B has the rest, since that
    is the scale that a rate of adapters is meant for.

    Args:
        module: with the adapters on it, where there are any.
        weights: what is trained, by the weight's name.

    Raises:
        ValueError: nothing that is trained is a key or a value of cross-attention.
    """
    names = [name for name in weights if is_cross_attention_projection(name.removesuffix(".weight"))]
    if not names:
        raise ValueError(
            "expected keys or values of cross-attention among the weights to train, to start from an edit"
        )
    for name in names:
        weight = weights[name]
        if isinstance(weight, nn.Parameter):
            weight.copy_(edit.edited(weight))
            continue
        base = module.get_submodule(name.removesuffix(".weight")).get_base_layer().weight
        _fit(weight, edit.edited(base) - base.to("cpu", torch.float64), edit.gram)


def _fit(adapter: LowRankChange, change: Tensor, gram: Tensor) -> None:
    """Set scaling * B A to the best approximation of a change [out, D] in the metric of a Gram matrix [D, D]."""
    rank, root = len(adapter.down), torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(change @ root, full_matrices=False)
    count = min(rank, len(values))
    down = torch.linalg.solve_triangular(root, right[:count], upper=False, left=False)
    lengths = down.norm(dim=1)
    usual = adapter.down.norm(dim=1)[:count].to("cpu", torch.float64)
    adapter.down[:count] = (down * (usual / lengths)[:, None]).to(adapter.down)
    adapter.up[:, :count] = (left[:, :count] * (values[:count] * lengths / usual) / adapter.scaling).to(adapter.up)
