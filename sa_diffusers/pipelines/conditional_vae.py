"""Draw images of given classes with a conditional VAE."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from sa_diffusers.models import ConditionalVAE


class ConditionalVAEPipeline(DiffusionPipeline):
    """Labels in, images out: the mean of p(x | z, c) for a random z.

    Args:
        vae: the model.
        id2label: the name of each class by its index, as a string since it is stored as JSON; None names them by it.

    Raises:
        ValueError: not one name a class.
    """

    def __init__(self, vae: ConditionalVAE, id2label: dict[str, str] | None = None):
        super().__init__()
        classes = range(vae.config.num_classes)
        names = id2label or {str(index): str(index) for index in classes}
        if set(names) != {str(index) for index in classes}:
            raise ValueError(f"expected a name for each class from '0' to '{classes[-1]}', got {names}")
        self.register_modules(vae=vae)
        self.register_to_config(id2label={str(index): names[str(index)] for index in classes})

    @property
    def labels(self) -> list[str]:
        """The names of the classes in their order."""
        return list(self.config.id2label.values())

    def class_indices(self, labels: int | str | Sequence[int | str]) -> Tensor:
        """Class indices [B] of labels given as names or indices.

        Raises:
            ValueError: a label that the model does not have.
        """
        known = self.labels
        given = [labels] if isinstance(labels, int | str) else list(labels)
        indices = [known.index(x) if x in known else x for x in given]
        unknown = [x for x in indices if not isinstance(x, int) or not 0 <= x < len(known)]
        if unknown:
            raise ValueError(f"the model has no class {unknown[0]!r}; it has {', '.join(known)}")
        return torch.tensor(indices, dtype=torch.long)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | str | Sequence[int | str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image a label.

        Args:
            labels: names or indices of classes.
            generator: one for all, or one an image; makes the images reproducible.
            latents: z [B, latent_dim]; None draws them from N(0, I).
            output_type: "pil", "np" ([B, H, W, C]) or "pt" ([B, C, H, W]), both in [0, 1].

        Raises:
            ValueError: an unknown label or output type, or latents of another shape.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"expected output_type 'pil', 'np' or 'pt', got {output_type!r}")
        condition = self.class_indices(labels).to(self.device)
        shape = (len(condition), self.vae.config.latent_dim)
        if latents is None:
            latents = randn_tensor(shape, generator, self.device, self.vae.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"expected latents {list(shape)}, got {list(latents.shape)}")
        images = self.vae.decode(latents.to(self.device, self.vae.dtype), condition).float().cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = [Image.fromarray((image * 255).round().astype("uint8").squeeze()) for image in images]
        return ImagePipelineOutput(images) if return_dict else (images,)
