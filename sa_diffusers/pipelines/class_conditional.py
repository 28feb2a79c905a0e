"""Draw images of given classes with a diffusion model on pixels, with classifier-free guidance."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from diffusers import ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.pil_utils import numpy_to_pil
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sa_diffusers.pipelines.own_code import OwnCodePipeline


def name_classes(num_classes: int, id2label: Mapping[str, str] | None) -> dict[str, str]:
    """The name of each class by its index as a string; None names them by it. Raises ValueError: not one a class."""
    names = id2label or {str(index): str(index) for index in range(num_classes)}
    if set(names) != {str(index) for index in range(num_classes)}:
        raise ValueError(f"expected a name for each class from '0' to '{num_classes - 1}', got {dict(names)}")
    return {str(index): names[str(index)] for index in range(num_classes)}


def find_classes(labels: int | str | Sequence[int | str], names: Sequence[str]) -> Tensor:
    """Class indices [B] of labels given as names or indices. Raises ValueError: no class of that name or index."""
    given = [labels] if isinstance(labels, int | str) else list(labels)
    indices = [names.index(label) if label in names else label for label in given]
    unknown = [index for index in indices if not isinstance(index, int) or not 0 <= index < len(names)]
    if unknown:
        raise ValueError(f"the model has no class {unknown[0]!r}; it has {', '.join(names)}")
    return torch.tensor(indices, dtype=torch.long)


def to_output(images: Tensor, output_type: str) -> Tensor | list:
    """Images [B, C, H, W] in [0, 1] as "pt", as "np" ([B, H, W, C]), or as "pil" pictures."""
    if output_type == "pt":
        return images
    arrays = images.permute(0, 2, 3, 1).numpy()
    return arrays if output_type == "np" else numpy_to_pil(arrays)


def check_output_type(output_type: str) -> None:
    """Raise ValueError for another output type than those of `to_output`."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"expected output_type 'pil', 'np' or 'pt', got {output_type!r}")


class ClassConditionalPipeline(OwnCodePipeline):
    """Labels in, images out. The label after the last class is the null class, which guidance leads away from.

    Args:
        unet: with `num_class_embeds` = classes + 1, and with `resnet_time_scale_shift="scale_shift"` conditioned by
            FiLM; it predicts what the scheduler's `prediction_type` says.
        scheduler: any of diffusers that takes a noise prediction: DDPM, DDIM, DPM-Solver++, ...
        id2label: the name of each class by its index as a string, since it is stored as JSON; None names them by it.

    Raises:
        ValueError: a UNet without class embedding, or not one name a class.
    """

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, id2label: dict[str, str] | None = None):
        super().__init__()
        if not unet.config.num_class_embeds:
            raise ValueError("expected a UNet with num_class_embeds = classes + 1, got one that knows no classes")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label=name_classes(unet.config.num_class_embeds - 1, id2label))

    @property
    def labels(self) -> list[str]:
        """The names of the classes in their order."""
        return list(self.config.id2label.values())

    @property
    def null_class(self) -> int:
        """The label under which the model draws any class: what `""` stands for."""
        return len(self.config.id2label)

    def class_indices(self, labels: int | str | Sequence[int | str]) -> Tensor:
        """Class indices [B] of labels given as names or indices; "" is the null class. Raises ValueError: no class."""
        given = [labels] if isinstance(labels, int | str) else list(labels)
        indices = torch.full((len(given),), self.null_class)
        named = [position for position, label in enumerate(given) if label != ""]
        indices[named] = find_classes([given[position] for position in named], self.labels)
        return indices

    @torch.no_grad()
    def __call__(
        self,
        labels: int | str | Sequence[int | str],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        negative_labels: int | str | Sequence[int | str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image a label. Raises ValueError: what is unknown, none, or of another number or shape.

        Args:
            labels: names or indices of classes; "" is the null class.
            guidance_scale: s in null + s (conditional - null), so that 1 is no guidance; the w of Ho and Salimans
                (2022) is s - 1.
            negative_labels: what guidance leads away from, one for all or one an image; None: the null class.
            generator: one for all, or one an image, which makes each image independent of its batch.
            latents: the noise [B, C, H, W] to start from; None draws it from N(0, I).
            output_type: "pil", "np" ([B, H, W, C]) or "pt" ([B, C, H, W]), both in [0, 1].
        """
        check_output_type(output_type)
        condition = self.class_indices(labels).to(self.device)
        if not len(condition) or num_inference_steps < 1:
            raise ValueError(f"expected a label and a step or more, got {len(condition)} and {num_inference_steps}")
        negative = self.class_indices("" if negative_labels is None else negative_labels).to(self.device)
        if len(negative) not in (1, len(condition)):
            raise ValueError(f"expected 1 or {len(condition)} negative labels, got {len(negative)}")
        if isinstance(generator, list) and len(generator) != len(condition):
            raise ValueError(f"expected one generator, or {len(condition)}, got {len(generator)}")
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(condition), self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator, self.device, self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"expected latents {list(shape)}, got {list(latents.shape)}")
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        sample = latents.to(self.device, self.unet.dtype) * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(sample, timestep)
            predicted = self._predict(noisy, timestep, condition, negative, guidance_scale)
            sample = self.scheduler.step(predicted, timestep, sample, **extra).prev_sample
        images = ((sample.float().clamp(-1, 1) + 1) / 2).cpu()
        output = to_output(images, output_type)
        return ImagePipelineOutput(output) if return_dict else (output,)

    def _predict(
        self, noisy: Tensor, timestep: Tensor, condition: Tensor, negative: Tensor, guidance_scale: float
    ) -> Tensor:
        if guidance_scale == 1:
            return self.unet(noisy, timestep, class_labels=condition).sample
        both = torch.cat([negative.expand(len(condition)), condition])
        away, towards = self.unet(torch.cat([noisy, noisy]), timestep, class_labels=both).sample.chunk(2)
        return away + guidance_scale * (towards - away)
