"""Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761): new keys and values for a concept's text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sa_diffusers.data.prompts import Concept, is_folder
from sa_diffusers.families.stable_diffusion import TextToImageFamily


Tokens = Literal["tail", "last"]
Edit = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ClosedFormEdit:
    """A change of a UNet's cross-attention that is the same for every to_k and to_v: W' = W (I + change).

    Attributes:
        change: M [D, D], in float64, for text embeddings of width D.
        root: L [D, D], lower triangular. With G = L L^T, keys and values W' + N miss the edit's objective by exactly
            tr(N G N^T) more than W'.
    """

    change: Tensor
    root: Tensor

    def check(self, unet: nn.Module) -> dict[str, nn.Linear]:
        """The layers to edit, by name, of a UNet2DConditionModel or any module with attn2.to_k and attn2.to_v.

        Raises:
            ValueError: a UNet without cross-attention, with adapters on it, or that takes embeddings of another width.
        """
        layers, width = cross_attention_projections(unet), len(self.change)
        wrong = next((name for name, layer in layers.items() if layer.in_features != width), None)
        if wrong:
            raise ValueError(
                f"expected embeddings [K, {layers[wrong].in_features}], which {wrong} takes, got [K, {width}]"
            )
        return layers

    @torch.no_grad()
    def apply(self, unet: nn.Module) -> None:
        """Edit a UNet in place. Raises ValueError as `check`; nothing has been changed then."""
        for layer in self.check(unet).values():
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
    preserve_scale: float = 0.1,
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
        erase_scale, preserve_scale, regularization: e, p and a. The defaults are those of the paper's code. a is in
            units of a squared embedding, so that edits of smaller embeddings are held back more by it.

    Raises:
        ValueError: no edit, embeddings of another shape or not finite, weights out of range, or a regularization so
            small beside the embeddings that the system cannot be solved.
    """
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


def is_cross_attention_projection(name: str) -> bool:
    """Whether a layer of a UNet makes keys or values of text, by its name in it."""
    return name.split(".")[-2:] in (["attn2", "to_k"], ["attn2", "to_v"])


def cross_attention_projections(unet: nn.Module) -> dict[str, nn.Linear]:
    """The layers that make keys and values of text, by name. Raises ValueError: there are none, or no linear ones."""
    layers = {name: layer for name, layer in unet.named_modules() if is_cross_attention_projection(name)}
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no cross-attention (attn2) whose keys and values could be edited")
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"expected a linear layer, got {name}, a {type(layer).__name__}; fuse or unload adapters first"
            )
    return layers


def edit_of_prompts(
    family: TextToImageFamily,
    edits: Sequence[tuple[str, str]],
    preserve: Sequence[str] = ("",),
    *,
    tokens: Tokens = "tail",
    **weights: float,
) -> ClosedFormEdit:
    """`closed_form_edit` for prompts: what each draws, and what it should draw. Its `apply` edits the UNet.

    Args:
        edits: (concept, target) prompts, such as ("Brad Pitt", "a middle aged man"). The target "" stands for nothing
            in particular: its rows begin with the start token, as in the authors' code.
        preserve: prompts that should draw what they did. The authors' code keeps "" where nothing else is given.
        tokens: "tail" is the code of the paper: the last word's token and the padding after it, each concept row
            paired with the target's at the same distance from its last word, and every token of what is preserved.
            "last" is their later code: the last word's token alone, everywhere, with preserve_scale 1.
        weights: erase_scale, preserve_scale, regularization; see `closed_form_edit`.

    Raises:
        TypeError: a family of another kind.
        ValueError: as `closed_form_edit`; an empty concept; another choice of tokens.
    """
    if not isinstance(family, TextToImageFamily):
        raise TypeError(f"expected a TextToImageFamily, whose prompts are free text, got a {type(family).__name__}")
    if tokens not in get_args(Tokens):
        raise ValueError(f"expected tokens to be one of {', '.join(get_args(Tokens))}, got {tokens!r}")
    if not all(concept.strip() for concept, _ in edits):
        raise ValueError("expected a concept, got an empty prompt: editing it would change every picture")
    family.prepare([prompt for pair in edits for prompt in pair] + list(preserve))
    pairs = [_paired_rows(family, *pair, tokens) for pair in edits]
    every = tokens == "tail"
    kept = [family.embed([p])[0] if every else _paired_rows(family, p, p, tokens)[0] for p in preserve]
    return closed_form_edit(pairs, kept, **weights)


def concept_edits(concept: Concept, templates: Sequence[str]) -> list[tuple[str, str]]:
    """The edits that forget a concept: each phrasing to the surrogate, alone and in each template ("a photo of {}").

    Raises:
        ValueError: a surrogate that is no prompt.
    """
    if concept.surrogate == "noise" or is_folder(concept.surrogate):
        raise ValueError(
            f"a closed-form edit (method uce, start edit) puts one text in the place of another: expected a prompt as "
            f"surrogate, got {concept.surrogate!r}"
        )
    texts = dict.fromkeys(["{}", *templates])
    return [(t.replace("{}", p), t.replace("{}", concept.surrogate)) for t in texts for p in concept.phrasings]


def _paired_rows(family: TextToImageFamily, concept: str, target: str, tokens: Tokens) -> Edit:
    """The embeddings of two prompts, [K, D] each, from the last word's token on, cut to one length."""
    rows, starts = family.embed([concept, target]), [_last_word(family, prompt) for prompt in (concept, target)]
    length = 1 if tokens == "last" else rows.shape[1] - max(starts)
    first, second = (row[start : start + length] for row, start in zip(rows, starts, strict=True))
    return first, second


def _last_word(family: TextToImageFamily, prompt: str) -> int:
    """Position of a prompt's last token before the end token; of the start token for an empty prompt."""
    return len(family.pipeline.tokenizer(prompt, truncation=True).input_ids) - 2


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
