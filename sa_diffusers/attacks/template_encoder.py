"""Text embeddings of templates such as "a photo of {}" with vectors of the token table's space in the place of {}."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_diffusers.families import Family


WORD_END = "</w>"  # CLIP's mark
PLACE = "{}"  # where the concept stands in a template


class TemplateEncoder:
    """Text embeddings of T templates, each with one {} or several, filled with the same K vectors.

    Every vector counts as one token. With the table's rows of a word's tokens the result is that of the word.

    Raises:
        ValueError: a template without {}, or longer than the text encoder reads, which would cut it.
    """

    def __init__(self, family: Family, templates: Sequence[str], num_vectors: int):
        if not templates:
            raise ValueError("expected at least one template such as 'a {}', got none")
        self.pipeline, self.templates, self.num_vectors = family.pipeline, list(templates), num_vectors
        self.device = family.device
        weight = self.pipeline.text_encoder.get_input_embeddings().weight
        self.table: Tensor = weight.detach().to(self.device)  # [V, D]
        rows = [self._row(template) for template in self.templates]
        self.ids, self.slots = (torch.tensor(part, device=self.device) for part in zip(*rows, strict=True))  # [T, L]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, without the special ones."""
        return self.pipeline.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens."""
        text = self.pipeline.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return text.replace(WORD_END, " ").strip()  # a deep copy of transformers' CLIPTokenizer leaves the mark in

    def start(self, words: str) -> list[int]:
        """K token ids of some words: those of fewer are repeated, those beyond K are left out."""
        ids = self.tokens(words)
        return [ids[k % len(ids)] for k in range(self.num_vectors)]

    def reads_as(self, text: str, token_ids: Sequence[int]) -> bool:
        """Whether the tokenizer turns every template, filled with the text, into these tokens in the place of {}."""
        filled = [template.replace(PLACE, text) for template in self.templates]
        ids = self.pipeline.tokenizer(filled, padding="max_length", truncation=True, return_tensors="pt").input_ids
        values = torch.tensor([*token_ids], device=self.device)
        return torch.equal(ids.to(self.device), torch.where(self.slots < 0, self.ids, values[self.slots.clamp_min(0)]))

    def check_places(self, word: str) -> None:
        """Raise ValueError for a template in which a word in the place of {} would be read as part of another."""
        for template in self.templates:
            pieces = [self.tokens(piece) for piece in template.split(PLACE)]
            apart = pieces[0] + [token for piece in pieces[1:] for token in self.tokens(word) + piece]
            if self.tokens(template.replace(PLACE, word)) != apart:
                raise ValueError(f"expected {{}} as a word of its own, got {template!r}: put spaces around it")

    def __call__(self, vectors: Tensor, rows: Sequence[int]) -> Tensor:
        """Text embeddings [B, L, D] of the templates `rows`, from vectors [K, D]; gradients pass to the vectors."""
        slots = self.slots[list(rows)]
        encoder, ids = self.pipeline.text_encoder, self.ids[list(rows)]

        def fill(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return torch.where(slots[..., None] >= 0, vectors.to(output)[slots.clamp_min(0)], output)

        handle = encoder.get_input_embeddings().register_forward_hook(fill)
        try:
            return encoder(ids)[0]
        finally:
            handle.remove()

    def _row(self, template: str) -> tuple[list[int], list[int]]:
        """Padded token ids [L] of a template, and which vector goes where: its index, -1 for the template's own."""
        if PLACE not in template:
            raise ValueError(f"each template must hold {{}} where the concept goes; this one does not: {template!r}")
        tokenizer = self.pipeline.tokenizer
        first, *rest = (self.tokens(piece) for piece in template.split(PLACE))
        ids, slots = [tokenizer.bos_token_id, *first], [-1] * (1 + len(first))
        for piece in rest:
            # What stands in the place itself is overwritten; the start token is no end token, where poolers look.
            ids += [tokenizer.bos_token_id] * self.num_vectors + piece
            slots += [*range(self.num_vectors), *[-1] * len(piece)]
        padding = tokenizer.model_max_length - len(ids) - 1
        if padding < 0:
            raise ValueError(
                f"the template {template!r} comes to {len(ids) + 1} tokens with {self.num_vectors} in the place of "
                f"{{}}; the text encoder reads {tokenizer.model_max_length}: shorten it or pass a smaller num_tokens"
            )
        return [*ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding], [*slots, *[-1] * (1 + padding)]
