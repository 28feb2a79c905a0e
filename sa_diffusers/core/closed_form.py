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
PRECISION = 1e-5  # of an edit, at least


@dataclass(frozen=True)
class ClosedFormEdit:
    """A change that is the same for every linear map of text embeddings: W' = W (I + change).

    Attributes:
        change: M [D, D], in float64.
        root: L [D, D], lower triangular. With G = L L^T, W' + N misses the edit's objective by tr(N G N^T) more.
    """

    change: Tensor
    root: Tensor

    def check(self, maps: Mapping[str, nn.Linear]) -> None:
        """Raise ValueError unless all of the maps, by name, take embeddings of this width."""
        width = len(self.root)
        for name, layer in maps.items():
            if layer.in_features != width:
                raise ValueError(f"expected embeddings [K, {layer.in_features}], which {name} takes, got [K, {width}]")

    @torch.no_grad()
    def apply(self, maps: Mapping[str, nn.Linear]) -> None:
        """Edit the maps in place. Raises ValueError as `check`; nothing has been changed then."""
        self.check(maps)
        for name, layer in maps.items():
            layer.weight.copy_(self.edited(name, layer.weight))

    def delta(self, name: str, weight: Tensor) -> Tensor:
        """W' - W of a layer's W [out, D], in float64 on the CPU."""
        return weight.to("cpu", torch.float64) @ self.change

    def edited(self, name: str, weight: Tensor) -> Tensor:
        """W' of a layer's W [out, D], likewise."""
        return weight.to("cpu", torch.float64) + self.delta(name, weight)

    def tensors(self) -> dict[str, Tensor]:
        """What `load` makes it of again."""
        return {"change": self.change, "root": self.root}

    def save(self, path: str | Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, path)

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

        e sum |W' c - W t|^2 + p sum |W' k - W k|^2 + a |W' - W|^2       (Eq. 7, weights of the authors' code).

    So W' G = W (G + e sum (t - c) c^T) with G = a I + e sum c c^T + p sum k k^T, and M = e sum (t - c) c^T G^-1
    depends on no layer: one system of D equations serves all. It is solved in float64 on the CPU, since G's condition
    number is about the squared norm of all the embeddings over a.

    Args:
        edits: (concept, target) text embeddings, both [K, D]; row i of the target replaces row i of the concept.
        preserve: text embeddings [K, D] whose keys and values should stay.
        erase_scale, preserve_scale, regularization: e > 0, p >= 0 and a > 0, which is in units of a squared embedding.
            p None: max(0.1, 1 / n) for n preserved texts, as in the paper's code.

    Raises:
        ValueError: no edit, embeddings of another shape or not finite, weights out of range, or a regularization so
            small beside the embeddings that the edit would be known to fewer digits than `PRECISION`.
    """
    if preserve_scale is None:
        preserve_scale = max(0.1, 1 / max(1, len(preserve)))
    for name, value in {"erase_scale": erase_scale, "regularization": regularization}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"expected {name} > 0, got {value}")
    if not 0 <= preserve_scale < math.inf:
        raise ValueError(f"expected preserve_scale >= 0, got {preserve_scale}")
    check_embeddings(edits, preserve)
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
    *_, largest = eigenvalues = torch.linalg.eigvalsh(gram).tolist()
    least = largest * torch.finfo(torch.float64).eps / PRECISION
    if eigenvalues[0] < least:
        raise ValueError(
            f"a regularization of {regularization:g} is lost in rounding beside these embeddings, and the edit would "
            f"change what has nothing to do with it; pass {1.1 * least:.2g} or more"
        )
    root = torch.linalg.cholesky(gram)
    return ClosedFormEdit(torch.linalg.solve(gram, moved, left=False), root)


@torch.no_grad()
def start_from_edit(
    module: nn.Module,
    weights: Mapping[str, nn.Parameter] | Mapping[str, LowRankChange],
    edit: ClosedFormEdit,
    reads_text: Callable[[str], bool],
) -> None:
    """Put what is trained where the edit would put it, in place; all that the edit leaves alone stays.

    Weights become W (I + M). An adapter of rank r takes of the change N = W M the B A that minimises the edit's own
    objective, tr((N - B A) G (N - B A)^T), by the singular vectors of N L (Eckart-Young). The rows of A are as long as
    those they replace, and B has the rest, so that a smaller learning rate fits than where B begins at 0.

    Args:
        module: with the adapters on it, where there are any; these must be fresh, with B = 0.
        weights: what is trained, by the weight's name.
        edit: of this module as it is without adapters.
        reads_text: whether a layer is one that the edit changes, by its name.

    Raises:
        ValueError: nothing that is trained reads text embeddings.
    """
    trained = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    trained = {name: weight for name, weight in trained.items() if reads_text(name)}
    if not trained:
        raise ValueError(
            "expected keys or values of cross-attention among the weights to train, to start from an edit"
        )
    for name, weight in trained.items():
        if isinstance(weight, nn.Parameter):
            weight.copy_(edit.edited(name, weight))
        else:
            _fit(weight, edit.delta(name, module.get_submodule(name).get_base_layer().weight), edit.root)


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


def check_embeddings(edits: Sequence[Edit], preserve: Sequence[Tensor]) -> None:
    """Raise ValueError unless all are finite rows of one width, as many of a target as of its concept."""
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
