"""Models that complete pictures by tokens of a codebook, a few at a time."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import TokenLoss
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.completion.patches import PatchFamily
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.pipelines import TokenInpaintPipeline


@register
class TokenInpaintFamily(PatchFamily):
    """Adapter of a TokenInpaintPipeline. A patch is what a token stands for; the codebook stays as it is."""

    name = "token_inpaint"
    pipelines = ("TokenInpaintPipeline",)
    own_classes = (TokenInpaintPipeline,)
    sized_by = ("vq", "sample_size")
    component = "transformer"
    scopes = {
        "full": lambda name: True,
        "encoder": lambda name: name.split(".")[0] in ("embedding", "positions", "encoder"),
    }
    defaults = read_yaml("bundled/families/token_inpaint.yaml")

    image_channels = property(attrgetter("pipeline.vq.config.in_channels"))
    resolution = property(attrgetter("pipeline.vq.config.sample_size"))
    rows = property(attrgetter("module.config.rows"))

    def make_loss(self) -> TokenLoss:
        return TokenLoss(self.pipeline.tokenise)

    def complete(
        self, images: Tensor, conditions: Sequence[Condition], seeds: Sequence[int], steps: int | None = None
    ) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        steps = steps or self.defaults["num_inference_steps"]
        with autocast_forward(self.module, self.compute_dtype):
            return self.pipeline.complete(images, self.hidden(conditions), generators, steps).float().cpu()

    def noised(self, batch: Batch, generator: torch.Generator, shares: Sequence[float] = (0.0, 1.0)) -> Batch:
        """With what its loss shows of the holes, as in training; features are of what is visible alone."""
        return {**batch, "noise": self.loss.sample_noise(batch, generator)}

    def features(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """What the encoder of the module, or of a copy of it, makes of a batch with its hole: one [B, L, D]."""
        return [self.loss.forward(model, batch).features]

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        tokens, codes = configurations("transformer"), configurations("vq")
        size, factor = codes.get("sample_size", 32), 2 ** (len(codes.get("block_out_channels", (64,))) - 1)
        channels = codes.get("in_channels", 3)
        if (
            not isinstance(size, int)
            or size % factor
            or channels not in (1, 3)
            or codes.get("out_channels", 3) != channels
        ):
            raise ValueError(
                f"expected a VQModel of square pictures, grey or RGB, of a size that {factor} divides, got the "
                f"sample_size {size} and {channels} channels"
            )
        rows = size // factor
        found = tokens.get("num_tokens"), tokens.get("rows")
        if found != (codes.get("num_vq_embeddings", 256), rows):
            raise ValueError(
                f"expected a transformer of the {codes.get('num_vq_embeddings', 256)} codes and {rows} rows that its "
                f"VQModel makes, got num_tokens {found[0]} and rows {found[1]}"
            )
