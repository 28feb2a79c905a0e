"""The ResNet that Selective Amnesia's CIFAR10 and STL10 experiments are judged with."""

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from sa_diffusers.evaluation.judges.classifier import ImageClassifier


LayerType = Literal["basic", "bottleneck"]
Stem = Literal["imagenet", "small"]
SIZES = ("depths", "hidden_sizes", "layer_type", "embedding_size")  # what a saved ResNet decides of a classifier


class ResNetClassifier(ImageClassifier):
    """A ResNet (He et al. 2016) with one linear head for each attribute; the defaults are those of ResNet-34.

    Args:
        attributes, words, accuracy: as in `AttributeClassifier`.
        image_size: height and width of the images in pixels.
        input_size: the network sees the images scaled to this height and width (bilinear, antialiased where it is
            smaller); None: as they are. The paper scales them to 224, which its ImageNet weights were trained on.
        depths, hidden_sizes: residual blocks of each stage, and their width.
        layer_type: the kind of block: basic (ResNet-18 and 34) or bottleneck (ResNet-50 and deeper).
        embedding_size: width of the stem.
        stem: imagenet (a 7x7 convolution and a pooling, which leave a quarter of height and width) or small (one 3x3
            convolution that leaves all of it: He et al.'s for CIFAR10, section 4.2). Of images of 32 pixels that are
            not scaled up the former leaves a height of 8 before the first block and of 1 after the last: too little.

    Raises:
        ValueError: `words` does not fit `attributes`, another number of widths than of depths, another layer type or
            stem.
    """

    @register_to_config
    def __init__(
        self,
        attributes: dict[str, list[str]],
        words: dict[str, dict[str, list[str]]] | None = None,
        accuracy: dict[str, float] | None = None,
        image_size: int = 32,
        input_size: int | None = None,
        depths: tuple[int, ...] = (3, 4, 6, 3),
        hidden_sizes: tuple[int, ...] = (64, 128, 256, 512),
        layer_type: LayerType = "basic",
        embedding_size: int = 64,
        stem: Stem = "imagenet",
    ):
        super().__init__()
        if len(depths) != len(hidden_sizes):
            raise ValueError(f"expected as many depths as hidden_sizes, got {list(depths)} and {list(hidden_sizes)}")
        if layer_type not in ("basic", "bottleneck") or stem not in ("imagenet", "small"):
            raise ValueError(
                f"expected the layer_type basic or bottleneck and the stem imagenet or small, got {layer_type!r} and "
                f"{stem!r}"
            )
        sizes = {"depths": list(depths), "hidden_sizes": list(hidden_sizes), "embedding_size": embedding_size}
        self.resnet = ResNetModel(ResNetConfig(layer_type=layer_type, **sizes))
        if stem == "small":
            convolution = nn.Conv2d(3, embedding_size, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as all the others
            self.resnet.embedder.embedder.convolution = convolution
            self.resnet.embedder.pooler = nn.Identity()
        self._add_heads(attributes, words, hidden_sizes[-1])
        for head in self.heads.values():
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)

    @classmethod
    def from_resnet(cls, source: str, attributes: dict[str, list[str]], **options) -> "ResNetClassifier":
        """A classifier whose ResNet has the weights in `source`, and whose heads are new.

        Args:
            source: a ResNet of transformers, hub id or local folder, such as `microsoft/resnet-34`.
            options: as the constructor's, but for the sizes and the stem, which are those of the weights.

        Raises:
            OSError: there is no ResNet to read, or the hub cannot be reached.
            ValueError: it has parts that this class does not have, or lacks weights.
        """
        classifier = cls(attributes, **saved_sizes(source), **options)
        # transformers draws missing weights at random, and only warns of it.
        classifier.resnet, found = ResNetModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise ValueError(
                f"expected all weights of the ResNet in {source}, got none for {missing[0]} and {len(missing) - 1} "
                "more; save it again or take another, such as microsoft/resnet-34"
            )
        return classifier

    def features(self, images: Tensor) -> Tensor:
        """Means over the last stage's maps."""
        self._check_images(images)
        size = self.config.input_size
        if size is not None and size != self.config.image_size:
            images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        return self.resnet(images).pooler_output.flatten(1)


def saved_sizes(source: str) -> dict[str, list[int] | int | str]:
    """The sizes of a saved ResNet, as arguments of `ResNetClassifier`; reads its configuration, not its weights.

    Raises:
        OSError: there is no configuration, or the hub cannot be reached.
        ValueError: it is not of a ResNet, or of one with parts that `ResNetClassifier` does not have.
    """
    try:
        values, _ = ResNetConfig.get_config_dict(source)
    except OSError as error:
        raise OSError(
            f"expected a ResNet of the hub or in a local folder, such as microsoft/resnet-34, got {source!r}, where "
            f"none can be read ({error}). Without a network train from scratch: `--pretrained null` and the "
            "settings in the first lines of configs/cifar10_classifier.yaml"
        ) from error
    if values.get("model_type") != "resnet":
        raise ValueError(
            f"expected a ResNet of transformers, such as microsoft/resnet-34, got a model of type "
            f"{values.get('model_type')!r} in {source}"
        )
    config, standard = ResNetConfig.from_dict(values), ResNetConfig()
    for name in ("num_channels", "hidden_act", "downsample_in_first_stage", "downsample_in_bottleneck"):
        if getattr(config, name) != getattr(standard, name):
            raise ValueError(
                f"expected a ResNet with {name} {getattr(standard, name)}, got {getattr(config, name)} in {source}; "
                "take another, such as microsoft/resnet-34"
            )
    return {name: getattr(config, name) for name in SIZES}
