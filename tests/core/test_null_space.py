"""The edit in the null space of retained embeddings, against the paper's formula and its constraints."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sa_diffusers.core.null_space import NullSpaceEdit, null_space_edit


SIZE, OUT = 12, 7
OPTIONS = {"threshold": 0.1, "retain_scale": 0.7}


def rows(count: int, rank: int = SIZE, seed: int = 0) -> torch.Tensor:
    """Of a subspace of the first axes, turned."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))[0]
    return torch.randn(count, rank, dtype=torch.float64, generator=generator) @ turn[:rank]


@pytest.fixture
def maps() -> dict[str, nn.Linear]:
    return {name: nn.Linear(SIZE, OUT, bias=False).double() for name in ("keys", "values")}


EDITS = [(rows(2, seed=1), rows(2, seed=2)), (rows(1, seed=3), rows(1, seed=4))]
RETAINED, FIXED = rows(30, rank=5, seed=5), rows(2, seed=6)


def edit(maps: dict[str, nn.Linear], **changes: object) -> NullSpaceEdit:
    options = OPTIONS | {"augmentations": 0, "generator": torch.Generator().manual_seed(0)} | changes
    return null_space_edit(maps, EDITS, changes.pop("retained", RETAINED), FIXED, **{
        name: value for name, value in options.items() if name != "retained"
    })  # fmt: skip


def of_the_paper(weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """W' - W as the paper writes it: projections P and Q, embeddings as columns, sums a row at a time."""
    one, (targets, anchors) = torch.eye(SIZE, dtype=torch.float64), (torch.zeros(SIZE, SIZE).double() for _ in "ab")
    for concept, target in EDITS:
        for c, t in zip(concept, target, strict=True):
            targets, anchors = targets + torch.outer(c, c) / len(EDITS), anchors + torch.outer(t, c) / len(EDITS)
    left, values, _ = torch.linalg.svd(sum(torch.outer(k, k) for k in kept) / len(kept))
    p = left[:, values < OPTIONS["threshold"]] @ left[:, values < OPTIONS["threshold"]].T
    m, k2 = torch.inverse(targets @ p + OPTIONS["retain_scale"] * one), FIXED.T
    q = one - m @ k2 @ torch.inverse(k2.T @ p @ m @ k2) @ k2.T @ p
    return weight @ (anchors - targets) @ p @ q @ m


def test_every_layer_equals_the_formula_of_the_paper(maps):
    found = edit(maps)
    for name, layer in maps.items():
        change = found.delta(name, layer.weight)
        assert change.abs().max() > 0.05
        assert_close(change, of_the_paper(layer.weight.detach(), RETAINED), rtol=1e-9, atol=1e-10)


def test_only_rows_that_the_edit_would_move_are_retained_and_their_copies(maps):
    """Written out with loops; the noise is the generator's own."""
    generator = torch.Generator().manual_seed(3)
    found = edit(maps, augmentations=4, generator=generator)
    again = torch.Generator().manual_seed(3)
    concept = torch.cat([c for c, _ in EDITS]) / len(EDITS) ** 0.5
    target = torch.cat([t for _, t in EDITS]) / len(EDITS) ** 0.5
    moved = (target - concept).T @ concept @ torch.inverse(torch.eye(SIZE).double() + concept.T @ concept)
    for name, layer in maps.items():
        weight = layer.weight.detach()

        def more(these, weight=weight):
            lengths = [float((weight @ moved @ row).norm()) for row in these]
            return [row for row, length in zip(these, lengths, strict=True) if length > sum(lengths) / len(lengths)]

        kept = more(RETAINED)
        assert 0 < len(kept) < len(RETAINED)
        direction = torch.linalg.svd(weight)[2][OUT - 1]
        copies = [row for _ in range(4) for row in kept]
        noise = torch.randn(len(copies), SIZE, generator=again, dtype=torch.float64)
        kept += more([row + (e @ direction) * direction for row, e in zip(copies, noise, strict=True)])
        expected = of_the_paper(weight, torch.stack(kept))
        assert_close(found.delta(name, weight), expected, rtol=1e-8, atol=1e-9)


def test_constraints(maps):
    """What is fixed, and what lies among retained directions, keeps its keys and values; concepts do not."""
    found = edit(maps)
    for name, layer in maps.items():
        change = found.delta(name, layer.weight)
        assert_close(FIXED @ change.T, torch.zeros(len(FIXED), OUT).double(), rtol=0, atol=1e-12)
        assert_close(RETAINED @ change.T, torch.zeros(len(RETAINED), OUT).double(), rtol=0, atol=1e-12)
    found.apply(maps)
    free = edit(maps, retain_scale=1e-9)
    for name, layer in maps.items():
        inside = EDITS[1][0] @ free.delta(name, layer.weight).T
        wanted = (EDITS[1][1] - EDITS[1][0]) @ layer.weight.T
        assert_close(inside, wanted, rtol=1e-5, atol=1e-6)  # three rows of concepts in five directions that are free


def test_nothing_is_left_to_edit(maps):
    with pytest.raises(
        ValueError, match="direction of keys, and none is left to edit; pass a higher threshold than 0.1"
    ):
        edit(maps, retained=rows(40))


def test_what_is_saved_is_the_same_edit(maps, tmp_path):
    found = edit(maps)
    found.save(tmp_path / "edit.safetensors")
    loaded = NullSpaceEdit.load(tmp_path / "edit.safetensors")
    for name, layer in maps.items():
        assert_close(loaded.edited(name, layer.weight), found.edited(name, layer.weight), rtol=1e-12, atol=1e-12)
    assert_close(loaded.root, found.root, rtol=0, atol=0)
