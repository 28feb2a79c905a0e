"""Closed-form edits of the maps that read text: new keys and values for a concept's embeddings, nothing is trained.

Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761), and training that starts at such an edit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sa_diffusers.core.objectives import LowRankChange


Edit = tuple[Tensor, Tensor]
NEGLIGIBLE = 1e-9  # of the largest singular value: rounding of float64


@dataclass(frozen=True)
class ClosedFormEdit:
    """A change that is the same for every linear map of text embeddings: W' = W (I + change).

    Attributes:
        change: M [D, D], in float64, for text embeddings of width D.
        root: L [D, D], lower triangular. With G = L L^T, keys and values W' + N miss the edit's objective by exactly
            tr(N G N^T) more than W'.
    """

    change: Tensor
    root: Tensor

    def check(self, maps: Mapping[str, nn.Linear]) -> None:
        """Raise ValueError unless all of the maps, by name, take embeddings of this width."""
        width = len(self.change)
        wrong = next((name for name, layer in maps.items() if layer.in_features != width), None)
        if wrong:
            raise ValueError(
                f"expected embeddings [K, {maps[wrong].in_features}], which {wrong} takes, got [K, {width}]"
            )

    @torch.no_grad()
    def apply(self, maps: Mapping[str, nn.Linear]) -> None:
        """Edit the maps in place. Raises ValueError as `check`; nothing has been changed then."""
        self.check(maps)
        for layer in maps.values():
            layer.weight.copy_(self.edited(layer.weight))

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W of a W [out, D], new, in float64 on the CPU."""
        return weight.to("cpu", torch.float64) @ self.change

    def edited(self, weight: Tensor) -> Tensor:
        """W' of a W [out, D], likewise."""
        return weight.to("cpu", torch.float64) + self.delta(weight)

    def save(self, path: str | Path) -> None:
        save_file({"change": self.change.contiguous(), "root": self.root.contiguous()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "ClosedFormEdit":
        return cls(**load_file(path))


def closed_form_edit(
    edits: Sequence[Edit],
    preserve: Sequence[Tensor] = (),
    *,
    erase_scale: float = 1.0,
    preserve_scale: float | None = None,
    regularization: float = 0.5,
) -> ClosedFormEdit:
    """The edit that gives concepts the keys and values of their targets, and keeps those of other prompts.

    Every to_k and to_v of the UNet's cross-attention, W, becomes the W' that minimises, over the rows c of the
    concepts, t of their targets and k of what is preserved,

        e sum |W' c - W t|^2 + p sum |W' k - W k|^2 + a |W' - W|^2,

    which is the paper's Eq. 7 with the weights e, p and a of the authors' code. The edits are simultaneous: W is
    always the one before the edit. The sums run over rows, so more or longer prompts weigh more.

    Setting the gradient of the objective to zero gives W' (a I + e sum c c^T + p sum k k^T) = W (a I + e sum t c^T +
    p sum k k^T). With G the bracket on the left, the one on the right is G + e sum (t - c) c^T, so that
    M = e sum (t - c) c^T G^-1 depends on no layer and one system of D equations serves all of them.
    It is solved in float64 on the CPU: G's condition number is about the squared norm of all the embeddings over a.

    Args:
        edits: (concept, target) text embeddings, both [K, D]; row i of the target replaces row i of the concept.
        preserve: text embeddings [K, D] whose keys and values should stay.
        erase_scale, preserve_scale, regularization: e, p and a. The defaults are those of the paper's code, where p is
            max(0.1, 1 / n) for n texts that are preserved. a is in units of a squared embedding, so that edits of
            smaller embeddings are held back more by it.

    Raises:
        ValueError: no edit, embeddings of another shape or not finite, weights out of range, or a regularization so
            small beside the embeddings that the system cannot be solved.
    """
    if preserve_scale is None:
        preserve_scale = max(0.1, 1 / max(1, len(preserve)))
    _check_weights(erase_scale, preserve_scale, regularization)
    _check_embeddings(edits, preserve)
    size = edits[0][0].shape[1]
    gram = regularization * torch.eye(size, dtype=torch.float64)
    moved = torch.zeros(size, size, dtype=torch.float64)
    for pair in edits:
        concept, target = (rows.to("cpu", torch.float64) for rows in pair)
        gram += erase_scale * concept.T @ concept
        moved += erase_scale * (target - concept).T @ concept
    for rows in preserve:
        rows = rows.to("cpu", torch.float64)
        gram += preserve_scale * rows.T @ rows
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ValueError(f"expected a larger regularization beside these embeddings, got {regularization:g}")
    return ClosedFormEdit(torch.linalg.solve(gram, moved, left=False), root)


@torch.no_grad()
def start_from_edit(
    module: nn.Module,
    weights: Mapping[str, nn.Parameter] | Mapping[str, LowRankChange],
    edit: ClosedFormEdit,
    reads_text: Callable[[str], bool],
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
        edit: of this module as it is without adapters.
        reads_text: whether a layer is one that the edit changes, by its name.

    Raises:
        ValueError: nothing that is trained reads text embeddings.
    """
    names = [name for name in weights if reads_text(name.removesuffix(".weight"))]
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


def _check_weights(erase_scale: float, preserve_scale: float, regularization: float) -> None:
    positive = {"erase_scale": erase_scale, "regularization": regularization}
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected {name} > 0, got {value}")
    if not (math.isfinite(preserve_scale) and preserve_scale >= 0):
        raise ValueError(f"expected preserve_scale >= 0, got {preserve_scale}")


def _check_embeddings(edits: Sequence[Edit], preserve: Sequence[Tensor]) -> None:
    if not edits:
        raise ValueError("expected one edit or more, (concept, target), got none")
    size = edits[0][0].shape[-1]
    for rows in [rows for pair in edits for rows in pair] + list(preserve):
        if rows.ndim != 2 or rows.shape[1] != size:
            raise ValueError(f"expected text embeddings [K, {size}], got {list(rows.shape)}")
        if not torch.isfinite(rows).all():
            raise ValueError("expected finite text embeddings, got infinite ones or NaN; use float32")
    for concept, target in edits:
        if len(concept) != len(target):
            raise ValueError(f"expected one target row a concept row, got {len(target)} for {len(concept)}")
