"""Training that starts at a closed-form edit instead of at the model as it is."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sa_diffusers.core.objectives import LowRankChange
from sa_diffusers.methods.uce import ClosedFormEdit, is_cross_attention_projection


NEGLIGIBLE = 1e-9  # of the largest singular value: rounding of float64


@torch.no_grad()
def start_from_edit(
    module: nn.Module, weights: Mapping[str, nn.Parameter] | Mapping[str, LowRankChange], edit: ClosedFormEdit
) -> None:
    """Put what is trained where the edit would put it, in place; all that the edit leaves alone stays.

    Weights become W (I + M). An adapter of rank r takes of the change N = W M what it can hold: the B A that is best
    by the edit's own objective, which minimises tr((N - B A) G (N - B A)^T), by the singular vectors of N L with
    G = L L^T (Eckart-Young). The rows of A are as long as those they replace, and B has the rest. So B does not begin
    at 0, and a step of A moves the weights more than it does in a fresh adapter: a smaller learning rate fits. Rows of
    A that the change has no use for stay as they were.

    Args:
        module: with the adapters on it, where there are any; these must be fresh, with B = 0.
        weights: what is trained, by the weight's name.
        edit: of this module as it is without adapters (`ClosedFormEdit.check`).

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
        _fit(weight, edit.delta(base), edit.root)


def _fit(adapter: LowRankChange, change: Tensor, root: Tensor) -> None:
    """Set scaling * B A, of a fresh adapter, to the best approximation of a change [out, D] in the metric L L^T."""
    left, values, right = torch.linalg.svd(change @ root, full_matrices=False)
    # Beyond the rank of the change the vectors are arbitrary, and would respond to hardly any text.
    count = min(len(adapter.down), int((values > NEGLIGIBLE * values[0]).sum()))
    down = torch.linalg.solve_triangular(root, right[:count], upper=False, left=False)
    lengths = down.norm(dim=1)
    usual = adapter.down.norm(dim=1)[:count].to("cpu", torch.float64)
    adapter.down[:count] = (down * (usual / lengths)[:, None]).to(adapter.down)
    adapter.up[:, :count] = (left[:, :count] * (values[:count] * lengths / usual) / adapter.scaling).to(adapter.up)
