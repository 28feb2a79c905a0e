"""Draw images of given classes with a conditional VAE."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines.class_conditional import check_output_type, find_classes, name_classes, to_output


class ConditionalVAEPipeline(DiffusionPipeline):
    """Labels in, images out: the mean of p(x | z, c) for a random z; `id2label` as of `ClassConditionalPipeline`."""

    def __init__(self, vae: ConditionalVAE, id2label: dict[str, str] | None = None):
        super().__init__()
        self.register_modules(vae=vae)
        self.register_to_config(id2label=name_classes(vae.config.num_classes, id2label))

    @property
    def labels(self) -> list[str]:
        """The names of the classes in their order."""
        return list(self.config.id2label.values())

    def class_indices(self, labels: int | str | Sequence[int | str]) -> Tensor:
        """Class indices [B] of labels given as names or indices. Raises ValueError: no such class."""
        return find_classes(labels, self.labels)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | str | Sequence[int | str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image a label, as `ClassConditionalPipeline` does, from `latents` z [B, latent_dim].

        Raises:
            ValueError: an unknown label or output type, or latents of another shape.
        """
        check_output_type(output_type)
        condition = self.class_indices(labels).to(self.device)
        shape = (len(condition), self.vae.config.latent_dim)
        if latents is None:
            latents = randn_tensor(shape, generator, self.device, self.vae.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"expected latents {list(shape)}, got {list(latents.shape)}")
        images = self.vae.decode(latents.to(self.device, self.vae.dtype), condition).float().cpu()
        output = to_output(images, output_type)
        return ImagePipelineOutput(output) if return_dict else (output,)
