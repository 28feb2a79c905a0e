"""Networks that turn images into feature vectors, by which sets of images are compared.

Any nn.Module serves that maps images [B, 3, H, W] in [-1, 1] to features [B, D]; those here resize and normalise by
themselves.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel

from sa_diffusers.evaluation.judges.classifier import AttributeClassifier, ImageClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import ModelLoadError, explain_load_errors
from sa_diffusers.report.pictures import to_uint8


INSTALL_INCEPTION = (
    'the Inception network needs the extra fid: pip install "sa_diffusers[fid]". It brings torchvision, '
    "which must be of the same build as torch (CPU or CUDA). Without it pass --extractor with a classifier of "
    "`sa-diffusers train-classifier` or a vision model of transformers"
)


class Extractor(nn.Module):
    """A feature extractor that may read class logits in the same pass; see `has_logits`.

    Subclasses implement `features_and_logits`.
    """

    has_logits = False

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] in [-1, 1] -> features [B, D] and logits [B, classes], or None without `has_logits`."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> features [B, D]."""
        return self.features_and_logits(images)[0]


class InceptionExtractor(Extractor):
    """The Inception network of FID, KID and Inception Score: 2,048 pooled features, 1,008 logits without bias.

    torch-fidelity's conversion of the TensorFlow weights of 2015-12-05 that published numbers are taken with. Images
    of any size are rounded to 8 bits and scaled to 299 pixels as TensorFlow 1 did: bilinear, without antialiasing.

    Raises:
        ModelLoadError: the extra `fid` is not installed or does not fit torch, or the weights cannot be downloaded.
    """

    has_logits = True

    def __init__(self):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision of another build cannot register its operators
            raise ModelLoadError(f"torch-fidelity cannot be imported ({error}); {INSTALL_INCEPTION}") from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except OSError as error:
            raise ModelLoadError(
                f"the weights of the Inception network cannot be read ({error}); where there is no network, copy "
                f"torch-fidelity's weights-inception-2015-12-05-6726825d.pth to {torch.hub.get_dir()}/checkpoints"
            ) from error

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(to_uint8(images))


class ClassifierExtractor(Extractor):
    """A classifier of this package: the activations before its heads.

    Images of another size than the classifier's are scaled to it: bilinear, antialiased.

    Args:
        classifier: the classifier; it is used in eval mode.
        attribute: whose logits to read; None: the only one it has, and no logits where it has several.

    Raises:
        ValueError: the classifier has no such attribute.
    """

    def __init__(self, classifier: ImageClassifier, attribute: str | None = None):
        super().__init__()
        known = list(classifier.config.attributes)
        if attribute is not None and attribute not in known:
            raise ValueError(f"expected an attribute of the classifier ({', '.join(known)}), got {attribute!r}")
        self.classifier = classifier.eval()
        self.attribute = known[0] if attribute is None and len(known) == 1 else attribute
        self.has_logits = self.attribute is not None

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.classifier.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        features = self.classifier.features(images)
        return features, self.classifier.heads[self.attribute](features) if self.has_logits else None


class TransformersExtractor(Extractor):
    """A vision model of transformers: its pooled output.

    Images are rounded to 8 bits, then resized, cropped and normalised by the model's own image processor.

    Args:
        model: a model whose only input is `pixel_values`.
        processor: the image processor that belongs to it.
        first_token: take the last state of the first token (CLS) in place of the pooled output.

    Raises:
        ValueError: the model takes something else than images.
    """

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor, first_token: bool = False):
        super().__init__()
        if model.main_input_name != "pixel_values":
            raise ValueError(
                f"expected a vision model, got {type(model).__name__}, which takes {model.main_input_name}; pass its "
                "vision part alone"
            )
        self.model, self.processor, self.first_token = model.eval(), processor, first_token

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, None]:
        pictures = list(to_uint8(images).cpu().numpy())
        pixels = self.processor(pictures, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        output = self.model(pixel_values=pixels.to(images.device))
        if self.first_token:
            return output.last_hidden_state[:, 0], None
        if output.get("pooler_output") is None:
            raise ValueError(f"expected a vision model with a pooled output, got {type(self.model).__name__}")
        return output.pooler_output.flatten(1), None


def load_extractor(source: str, attribute: str | None = None) -> Extractor:
    """An extractor by its name, in float32, in eval mode, on the CPU.

    Args:
        source: "inception"; a classifier of this package (local folder, hub id, or bundled/<name>); or a vision model
            of transformers (local folder or hub id).
        attribute: of a classifier, whose logits to read; see `ClassifierExtractor`.

    Raises:
        ModelLoadError: nothing that can be loaded, or the extra `fid` is missing; the message says what to do.
        ValueError: a model of another kind, an unknown attribute, or an attribute for what is no classifier.
    """
    extractor: Extractor
    if source == "inception":
        extractor = InceptionExtractor()
    else:
        folder = resolve(source)
        with explain_load_errors(folder):
            config = AttributeClassifier.load_config(folder)  # plain JSON, as both kinds have it
        if "model_type" not in config:
            return ClassifierExtractor(load_classifier(folder), attribute)
        with explain_load_errors(folder):
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # the same numbers with torchvision
            model, found = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        # transformers draws missing weights at random. A checkpoint of a classifier often has no pooler, which its
        # head does without: it reads the first token.
        missing = sorted(found["missing_keys"])
        if any(not name.startswith("pooler.") for name in missing):
            raise ValueError(f"expected all weights of {type(model).__name__} in {folder}, got none for {missing[0]}")
        extractor = TransformersExtractor(model, processor, first_token=bool(missing))
    if attribute is not None:
        raise ValueError(f"expected a classifier to read the attribute {attribute!r}, got {source}; omit it")
    return extractor
