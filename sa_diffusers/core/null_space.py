"""Closed-form edits that leave retained embeddings alone: each layer's change lies in their null space.

SPEED (Li et al., ICLR 2026, arXiv 2503.07392).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sa_diffusers.core.closed_form import NEGLIGIBLE, ClosedFormEdit, Edit, check_embeddings


@dataclass(frozen=True)
class NullSpaceEdit(ClosedFormEdit):
    """A change of its own for every layer: W' = W (I + change right).

    Attributes:
        change: [D, R], for all layers: what targets differ by from concepts.
        rights: {layer's name: [R, D]}, whose rows lie in the layer's null space.
    """

    rights: Mapping[str, Tensor]

    def delta(self, name: str, weight: Tensor) -> Tensor:
        return super().delta(name, weight) @ self.rights[name]

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"right.{name}": tensor for name, tensor in self.rights.items()}

    @classmethod
    def load(cls, path: str | Path) -> "NullSpaceEdit":
        tensors = load_file(path)
        rights = {
            name.removeprefix("right."): tensors.pop(name) for name in list(tensors) if name.startswith("right.")
        }
        return cls(**tensors, rights=rights)


@torch.no_grad()
def null_space_edit(
    maps: Mapping[str, nn.Linear],
    edits: Sequence[Edit],
    retained: Tensor,
    fixed: Tensor,
    *,
    generator: torch.Generator,
    augmentations: int = 10,
    threshold: float = 0.1,
    retain_scale: float = 1.0,
) -> NullSpaceEdit:
    """The edit that gives concepts the keys and values of their targets, within the null space of what is retained.

    For each layer W [out, D], over the rows c of n concepts and t of their targets, the D' that minimises

        1/n sum |W (t - c) - D' c|^2 + s |D'|^2    such that D' P = D' and D' f = 0 for every fixed row f.

    P projects on the eigenvectors of the retained rows' mean k k^T below a threshold. Of these rows only those enter
    whose keys or values the unconstrained edit would change more than on average, and with them noisy copies, likewise
    filtered: k + v v^T e with e ~ N(0, I) and v the right singular vector of W's smallest singular value.

    With V an orthonormal basis of what P leaves and f does not touch,

        D' = W (T - C)^T C V (V^T C^T C V + n s I)^-1 V^T,

    the same as the paper's product of projections, whose inverse needs f outside of P's kernel. In float64 on the CPU.

    Args:
        maps: the layers, by name, which stay as they are.
        edits: (concept, target) text embeddings, both [K, D]; row i of the target replaces row i of the concept.
        retained, fixed: embeddings [N, D] to keep nearly, and [M, D] exactly.
        generator: of the noise, on the CPU.
        augmentations: noisy copies of each retained row; 0: neither copies nor filter, as in the authors' code.
        threshold: mean square along an eigenvector, below which nothing of the retained rows is said to lie there.
        retain_scale: s > 0, the weight of the change itself.

    Raises:
        ValueError: embeddings of another shape or not finite, or no direction that is left to edit.
    """
    check_embeddings(edits, [retained, fixed])
    every = (*map(torch.cat, zip(*edits, strict=True)), retained, fixed)
    concept, target, retained, fixed = (rows.to("cpu", torch.float64) for rows in every)
    concept, target = concept / len(edits) ** 0.5, target / len(edits) ** 0.5
    one, seen = torch.eye(concept.shape[1], dtype=torch.float64), concept.T @ concept
    moved = (target - concept).T @ concept
    free = torch.linalg.solve(one + seen, moved, left=False)
    left, values, right = torch.linalg.svd(moved)
    rank = int((values > NEGLIGIBLE * values[0]).sum())
    rights = {}
    for name, layer in maps.items():
        weight = layer.weight.to("cpu", torch.float64)
        kept = _augmented(retained, weight, free, augmentations, generator) if augmentations else retained
        basis = _null_space(kept, fixed, threshold)
        if not basis.shape[1]:
            said = f"the retained prompts say something along every direction of {name}, and none is left to edit"
            raise ValueError(f"{said}; pass a higher threshold than {threshold:g}, or fewer prompts")
        within = basis.T @ (seen + retain_scale * one) @ basis
        rights[name] = right[:rank] @ basis @ torch.linalg.solve(within, basis.T)
    root = torch.linalg.cholesky(seen + retain_scale * one + retained.T @ retained / len(retained))
    return NullSpaceEdit(left[:, :rank] * values[:rank], root, rights)


def _augmented(rows: Tensor, weight: Tensor, free: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Those of [N, D] that the unconstrained edit `weight @ free` moves, and such of their noisy copies."""
    kept = _moved(rows, weight @ free)
    direction = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    noise = torch.randn(count * len(kept), len(direction), generator=generator, dtype=torch.float64)
    copies = kept.repeat(count, 1) + (noise @ direction)[:, None] * direction
    return torch.cat([kept, _moved(copies, weight @ free)])


def _moved(rows: Tensor, change: Tensor) -> Tensor:
    """Those of [N, D] that a change [out, D] moves more than the mean, or all where none is."""
    norms = (rows @ change.T).norm(dim=1)
    chosen = rows[norms > norms.mean()]
    return chosen if len(chosen) else rows


def _null_space(kept: Tensor, fixed: Tensor, threshold: float) -> Tensor:
    """An orthonormal basis [D, M] of where rows have a mean square below a threshold, and fixed ones are exactly 0."""
    values, vectors = torch.linalg.eigh(kept.T @ kept / len(kept))
    basis = vectors[:, values < threshold]
    _, values, right = torch.linalg.svd(fixed @ basis)
    rank = int((values > 1e-9 * fixed.norm()).sum())
    return basis @ right[rank:].T
