"""A transformer that sees tokens on both sides, and tells what the hidden ones are."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class TokenTransformerOutput(BaseOutput):
    """Logits [B, L, num_tokens] of every place, and what the encoder makes of the tokens, [B, L, hidden_size]."""

    logits: Tensor | None = None  # with defaults: accelerate makes it anew, empty, where it casts what it holds
    features: Tensor | None = None


class TokenTransformer(ModelMixin, ConfigMixin):
    """Layers of an encoder and of a decoder, all of the same width, over a square of tokens (Chang et al. 2022).

    Args:
        num_tokens: K, of the codebook; another one stands for what is hidden.
        rows: of the square.
        num_layers, decoder_num_layers: of the encoder, which alone forgets, and of the decoder.
    """

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 128,
        rows: int = 8,
        hidden_size: int = 96,
        num_heads: int = 4,
        num_layers: int = 4,
        decoder_num_layers: int = 2,
    ):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens + 1, hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.1)  # at its own 1 a place is lost beside its token
        self.positions = nn.Parameter(0.1 * torch.randn(1, rows**2, hidden_size))
        for name, count in (("encoder", num_layers), ("decoder", decoder_num_layers)):
            blocks = [
                BasicTransformerBlock(hidden_size, num_heads, hidden_size // num_heads, activation_fn="gelu")
                for _ in range(count)
            ]
            setattr(self, name, nn.ModuleList(blocks))
        self.norm, self.head = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, num_tokens)

    def forward(self, tokens: Tensor, hidden: Tensor) -> TokenTransformerOutput:
        """Tokens [B, L] in [0, K), row by row; where `hidden` [B, L] is true they are not looked at."""
        states = self.embedding(tokens.masked_fill(hidden, self.config.num_tokens)) + self.positions
        for block in self.encoder:
            states = block(states)
        features = states
        for block in self.decoder:
            states = block(states)
        return TokenTransformerOutput(self.head(self.norm(states)), features)
