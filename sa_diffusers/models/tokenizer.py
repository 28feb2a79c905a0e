"""A CLIP tokenizer trained on captions, and a text encoder that reads what it writes."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def train_tokenizer(captions: Sequence[str], num_merges: int, max_length: int) -> CLIPTokenizer:
    """Train a CLIP tokenizer: every byte alone and at a word's end, `num_merges` merges, then the two special tokens.

    The end token has the largest id, where CLIPTextModel looks for it.
    """
    template = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = template.backend_tokenizer.normalizer
    trained.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in letters]
    # Of pairs that are as frequent the one of lower ids is merged first: ids by hash would be others in every process.
    ids = {"special_tokens": ends, "initial_alphabet": letters, "end_of_word_suffix": "</w>"}
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=3, show_progress=False, **ids)
    trained.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]][:num_merges]
    tokens = [*letters, *ends, *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def build_text_encoder(architecture: dict[str, Any], tokenizer: CLIPTokenizer | None = None) -> CLIPTextModel:
    """A CLIP text encoder with random weights.

    Args:
        architecture: fields of a CLIPTextConfig; `vocab_size` is the tokenizer's where it is missing.
        tokenizer: its special tokens are those that the encoder looks for; None: CLIP's own.
    """
    if tokenizer is not None:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        architecture = {"vocab_size": len(tokenizer), **architecture, **ids}
    return CLIPTextModel(CLIPTextConfig(**architecture))
