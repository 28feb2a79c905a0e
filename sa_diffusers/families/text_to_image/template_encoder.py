"""What templates such as "a photo of {}" are encoded as with vectors of token tables' space in the place of {}."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sa_diffusers.core.batches import Batch
from sa_diffusers.families.base import Family


WORD_END = "</w>"  # CLIP's mark
PLACE = "{}"  # where the concept stands in a template


class Reader:
    """How one of a model's text encoders reads T templates with K places in each.

    Args:
        length: tokens that it reads.
        frame: ids of those that stand before and after a prompt's own.
        cuts: read what it has room for of a longer template, as it does of a prompt, where no place is in that; else
            ValueError is raised.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: nn.Module,
        length: int,
        frame: Sequence[list[int]],
        templates: Sequence[str],
        places: int,
        cuts: bool = False,
    ):
        self.tokenizer, self.encoder, self.length, self.places = tokenizer, encoder, length, places
        self.cuts = cuts
        self.table: Tensor = encoder.get_input_embeddings().weight.detach()  # [V, D]
        self.first, self.last = frame
        # Tokenizers of bytes join a word and the space before it.
        self.space = " " if self.tokens(" a") != self.tokens("a") else ""
        rows = [self._row(template) for template in templates]
        self.ids, self.slots = (torch.tensor(part) for part in zip(*rows, strict=True))  # [T, L] each

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, without the special ones."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def single(self, texts: Sequence[str]) -> list[int]:
        """The id of each text that is one token of its own in the middle of a sentence, -1 of others."""
        read = self.tokenizer([self.space + text for text in texts], add_special_tokens=False).input_ids
        special = self.tokenizer.all_special_ids  # the unknown one is among them
        return [ids[0] if len(ids) == 1 and ids[0] not in special else -1 for ids in read]

    def start(self, words: str) -> list[int]:
        """K token ids of some words: those of fewer are repeated, those beyond K are left out."""
        ids = self.tokens(self.space + words)
        return [ids[k % len(ids)] for k in range(self.places)]

    def read(self, filled: Sequence[str]) -> Tensor:
        """Token ids [T, L] of whole prompts, as the model reads them."""
        room = self.length - len(self.first) - len(self.last)
        rows = [[*self.first, *self.tokens(text)[:room], *self.last] for text in filled]
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (self.length - len(row)) for row in rows])

    def pieces(self, template: str) -> list[list[int]]:
        """Token ids of what stands before, between and after the places."""
        *before, last = template.split(PLACE)
        return [self.tokens(piece.removesuffix(self.space)) for piece in before] + [self.tokens(last)]

    def apart(self, template: str, word: str) -> bool:
        """Whether a word in the place of {} is read as if it stood alone."""
        pieces = self.pieces(template)
        expected = pieces[0] + [token for piece in pieces[1:] for token in self.tokens(self.space + word) + piece]
        return self.tokens(self.space * template.startswith(PLACE) + template.replace(PLACE, word)) == expected

    def filled(self, vectors: Tensor, rows: list[int], hooks: ExitStack) -> None:
        """Until the hooks are closed its encoder reads these templates, with vectors [K, D], whatever it is given."""
        ids, slots = (part[rows].to(vectors.device) for part in (self.ids, self.slots))

        def replace(module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
            if inputs:
                return (ids, *inputs[1:]), named
            mask = (ids != self.tokenizer.pad_token_id).long()
            return inputs, named | {"input_ids": ids, "attention_mask": mask}

        def fill(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return torch.where(slots[..., None] >= 0, vectors.to(output)[slots.clamp_min(0)], output)

        hooks.callback(self.encoder.register_forward_pre_hook(replace, with_kwargs=True).remove)
        table = self.encoder.get_input_embeddings().weight
        for module in self.encoder.modules():  # T5 looks up by another module that shares the table
            if isinstance(module, nn.Embedding) and module.weight is table:
                hooks.callback(module.register_forward_hook(fill).remove)

    def _row(self, template: str) -> tuple[list[int], list[int]]:
        """Padded token ids [L] of a template, and which vector goes where: its index, -1 for the template's own."""
        first, *rest = self.pieces(template)
        ids, slots = [*self.first, *first], [-1] * (len(self.first) + len(first))
        # What stands in the place itself is overwritten; it must be no end token, where poolers look.
        filler = [*self.first, self.tokenizer.pad_token_id][:1]
        for piece in rest:
            ids += filler * self.places + piece
            slots += [*range(self.places), *[-1] * len(piece)]
        room = self.length - len(self.last)
        if len(ids) > room and not (self.cuts and max(slots[:room]) < 0):
            raise ValueError(
                f"the template {template!r} comes to {len(ids) + len(self.last)} tokens with {self.places} in the "
                f"place of {{}}; the text encoder reads {self.length}: shorten it or pass a smaller num_tokens"
            )
        pads = [*self.last, *[self.tokenizer.pad_token_id] * max(0, room - len(ids))]
        return [*ids[:room], *pads], [*slots[:room], *[-1] * len(pads)]


class TemplateEncoder:
    """What T templates, each with one {} or several, are encoded as when they are filled with the same K vectors.

    A vector has a part in the space of the token table of each text encoder that reads a place, one after the other,
    and counts as one token. With the tables' rows of a word's tokens the result is that of the word.

    Raises:
        ValueError: a template without {}, or longer than is read by a text encoder that reads the place, which would
            cut it.
    """

    def __init__(self, family: Family, templates: Sequence[str], num_vectors: int):
        without = [template for template in templates if PLACE not in template]
        if without or not templates:
            shown = f"; this one does not: {without[0]!r}" if without else ": expected at least one template, got none"
            raise ValueError(f"each template must hold {{}} where the concept goes{shown}")
        self.family, self.templates, self.device = family, list(templates), family.device
        readers = [Reader(*one, self.templates, num_vectors, i > 0) for i, one in enumerate(family.text_readers())]
        self.readers = [reader for reader in readers if (reader.slots >= 0).any()]
        self.others = [reader for reader in readers if reader not in self.readers]  # as a T5 that stands for zeros
        self.tokenizer = self.readers[0].tokenizer
        self.widths = [reader.table.shape[1] for reader in self.readers]

    @cached_property
    def shared(self) -> Tensor:
        """[E, V] for tokens of the first of E encoders: how each encoder numbers them, -1 where it has no such token;
        of other tokenizers, words alone.

        Raises ValueError: they share none, or read the first word of a text in another way than the others.
        """
        if self.readers[0].space and any(template.startswith(PLACE) for template in self.templates):
            raise ValueError("this model reads the first word of a text as another token; pass templates like 'a {}'")
        numbers = torch.arange(len(self.readers[0].table))
        rows, known, words = [numbers], self.tokenizer.get_vocab(), None
        for reader in self.readers[1:]:
            if reader.tokenizer.get_vocab() == known:
                rows.append(numbers)
                continue
            if words is None:
                texts = [self.text([i]) if i < len(self.tokenizer) else "" for i in numbers.tolist()]
                words = [text if text.isalnum() else "" for text in texts]
            rows.append(torch.tensor(reader.single(words)))
        if not (shared := torch.stack(rows)).ge(0).all(0).any():
            raise ValueError("the text encoders of this model share no word; pass --attack embedding")
        return shared

    @property
    def table(self) -> Tensor:
        """[V, D] for tokens of the first encoder, of all encoders side by side; only `shared` ones mean something."""
        tables = [reader.table[rows.clamp_min(0)] for reader, rows in zip(self.readers, self.shared, strict=True)]
        return torch.cat(tables, dim=1).to(self.device)

    @cached_property
    def scale(self) -> float:
        """Root mean square of the token tables."""
        return torch.cat([reader.table.flatten().float() for reader in self.readers]).square().mean().sqrt().item()

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, without the special ones, as the first encoder reads it in a place."""
        return self.readers[0].tokens(self.readers[0].space + text)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens of the first encoder."""
        text = self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return text.replace(WORD_END, " ").strip()  # a deep copy of transformers' CLIPTokenizer leaves the mark in

    def start(self, words: str) -> Tensor:
        """Vectors [K, D] of some words: the tokens of fewer are repeated, those beyond K are left out."""
        return torch.cat([reader.table[reader.start(words)] for reader in self.readers], dim=1).to(self.device)

    def random(self, generator: torch.Generator) -> Tensor:
        """Vectors [K, D] of tokens at random."""
        rows = [(r.table, torch.randint(len(r.table), (r.places,), generator=generator)) for r in self.readers]
        return torch.cat([table[chosen.to(table.device)] for table, chosen in rows], dim=1).to(self.device)

    def reads_as(self, text: str, token_ids: Sequence[int]) -> bool:
        """Whether every template, filled with the text, is read as these tokens in the place of {}."""
        filled, values = [template.replace(PLACE, text) for template in self.templates], self.shared[:, [*token_ids]]
        return all(
            torch.equal(r.read(filled), torch.where(r.slots < 0, r.ids, ids[r.slots.clamp_min(0)]))
            for r, ids in zip(self.readers, values, strict=True)
        )

    def check_places(self, word: str) -> None:
        """Raise ValueError for a template in which a word in the place of {} would be read as part of another."""
        for template in self.templates:
            if not all(reader.apart(template, word) for reader in self.readers):
                raise ValueError(f"expected {{}} as a word of its own, got {template!r}: put spaces around it")

    def __call__(self, vectors: Tensor, rows: Sequence[int]) -> Batch:
        """The templates `rows` encoded, from vectors [K, D]; gradients pass to the vectors."""
        with ExitStack() as hooks:
            for reader, part in zip(self.readers, vectors.split(self.widths, dim=1), strict=True):
                reader.filled(part, list(rows), hooks)
            for reader in self.others:
                reader.filled(reader.table[:1].to(self.device), list(rows), hooks)
            return self.family.encode_prompts(["a"] * len(rows))  # what it says is replaced


def fits(family: Family, template: str, num_vectors: int, word: str) -> bool:
    """Whether the text encoders read all of a template with so many vectors, and a word in it as one of its own."""
    try:
        TemplateEncoder(family, [template], num_vectors).check_places(word)
    except ValueError:
        return False
    return True
