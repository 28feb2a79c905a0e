"""What CLIP says of images: how well they fit their prompts, which name fits best, how much a picture has changed.

Its answers depend on the weights: state which (`Clip.name`) with every number. The usual ones are
openai/clip-vit-large-patch14 and, for CLIP scores, openai/clip-vit-base-patch16 or -patch32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, BaseImageProcessor, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sa_diffusers.evaluation.judges.image_checks import check_images
from sa_diffusers.io.hub import ModelLoadError, explain_load_errors
from sa_diffusers.io.processes import process_state
from sa_diffusers.report.pictures import to_uint8


BATCH_SIZE = 32  # images or texts that pass the model at once; no result depends on it


class Clip:
    """A CLIP model with its tokenizer and image processor, in float32 and eval mode.

    Images are rounded to 8 bits, then resized, cropped and normalised as the model's own files say. Texts longer than
    the model reads (77 tokens in all published ones) are cut, as Stable Diffusion cuts its prompts.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: BaseImageProcessor, name: str):
        self.model, self.tokenizer, self.processor, self.name = model.float().eval(), tokenizer, processor, name

    @classmethod
    def load(cls, source: str) -> "Clip":
        """From a local folder or the hub, onto this process's device.

        Raises:
            ModelLoadError: nothing that can be loaded, another kind of model, or one without all of its parts.
        """
        with explain_load_errors(source):
            kind = AutoConfig.from_pretrained(source).model_type
            if kind != "clip":
                raise ModelLoadError(f"expected a CLIP model in '{source}', got one of the type {kind}; pass another")
            model, found = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
            tokenizer = CLIPTokenizer.from_pretrained(source)
            processor = CLIPImageProcessorPil.from_pretrained(source)  # needs no torchvision
        if found["missing_keys"]:  # transformers draws them at random
            missing = sorted(found["missing_keys"])[0]
            raise ModelLoadError(f"'{source}' lacks weights of CLIP, such as {missing}; download or save it again")
        if len(tokenizer) != model.config.text_config.vocab_size:  # transformers builds an empty one without files
            raise ModelLoadError(
                f"'{source}' has a tokenizer of {len(tokenizer)} tokens for a model of "
                f"{model.config.text_config.vocab_size}; copy the tokenizer's files beside the weights"
            )
        return cls(model.to(process_state().device), tokenizer, processor, source)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] to embeddings [N, D] of unit length, on the CPU."""
        check_images(images)
        parts = [
            self.model.visual_projection(self.model.vision_model(pixel_values=self._pixels(part)).pooler_output)
            for part in images.split(BATCH_SIZE)
            if len(part)
        ]
        return self._unit(parts)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings [M, D] of unit length, on the CPU."""
        parts = []
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), BATCH_SIZE):
            part = list(texts[start : start + BATCH_SIZE])
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            parts.append(self.model.text_projection(self.model.text_model(**tokens).pooler_output))
        return self._unit(parts)

    @torch.no_grad()
    def hidden(self, images: Tensor) -> list[Tensor]:
        """The vision tower's states of images [N, 3, H, W] in [-1, 1], all at once: of the patches' embeddings and of
        each layer [N, tokens, width], on the model's device. The first token is the class token, not a patch.
        """
        check_images(images)
        output = self.model.vision_model(pixel_values=self._pixels(images), output_hidden_states=True)
        return list(output.hidden_states)

    @property
    def logit_scale(self) -> float:
        """What the cosines of an image with texts are multiplied by before the softmax."""
        return self.model.logit_scale.exp().item()

    def _pixels(self, images: Tensor) -> Tensor:
        pictures = list(to_uint8(images.float()).cpu().numpy())
        found = self.processor(pictures, input_data_format="channels_first", return_tensors="pt")
        return found["pixel_values"].to(self.model.device)

    def _unit(self, parts: Sequence[Tensor]) -> Tensor:
        if not parts:
            return torch.empty(0, self.model.config.projection_dim)
        return F.normalize(torch.cat(list(parts)).float(), dim=-1).cpu()


def clip_score(clip: Clip, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """100 max(cos(image, prompt), 0) of each image [N, 3, H, W] and its prompt: [N].

    Hessel et al. 2021, Eq. 1, with the weight 100 in place of their 2.5, as is usual since, and without their "A photo
    depicts" in front.
    """
    if len(images) != len(prompts):
        raise ValueError(f"expected a prompt for each of {len(images)} images, got {len(prompts)} prompts")
    cosines = (clip.embed_images(images) * clip.embed_texts(prompts)).sum(-1)
    return 100 * cosines.clamp(min=0)


def zero_shot(clip: Clip, images: Tensor, names: Sequence[str]) -> Tensor:
    """Which of some names an image is "a photo of": probabilities [N, K], the softmax of scaled cosines (Radford et
    al. 2021).

    They say which name fits best, not that any does. CLIP accuracy is the share of images where the largest one is
    that of what was asked for: `zero_shot(...).argmax(1)`.

    Raises:
        ValueError: fewer than two names, or a name twice.
    """
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"expected two names or more, each of them once, got {names!r}")
    texts = clip.embed_texts([f"a photo of {name}" for name in names])
    return (clip.logit_scale * clip.embed_images(images) @ texts.T).softmax(-1)


@torch.no_grad()
def perceptual_change(clip: Clip, before: Tensor, after: Tensor, batch_size: int = 8) -> Tensor:
    """How much each picture has changed, as CLIP's vision tower sees it: [N] from 0 (equal) to 4.

    Like LPIPS (Zhang et al. 2018, Eq. 1), but ours, and comparable with nothing but itself: at the patches' embedding
    and at each layer every token's state is scaled to unit length, and the squared distance of the two is taken;
    mean over tokens, then over layers. No weights are fitted to human judgements.

    Args:
        before, after: images [N, 3, H, W] in [-1, 1], of the same prompts and seeds.
        batch_size: pairs that pass the model at once, which its states have to fit in memory with.
    """
    if before.shape != after.shape:
        raise ValueError(f"expected pairs of one shape, got {list(before.shape)} and {list(after.shape)}")
    changes = []
    for one, other in zip(before.split(batch_size), after.split(batch_size), strict=True):
        if len(one):
            layers = [
                (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean(-1)  # [B]
                for a, b in zip(clip.hidden(one), clip.hidden(other), strict=True)
            ]
            changes.append(torch.stack(layers).mean(0).cpu())
    return torch.cat(changes) if changes else torch.empty(0)
