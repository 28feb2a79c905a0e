"""The classifier of handwritten digits that Selective Amnesia's MNIST experiments are judged with."""

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from sa_diffusers.evaluation.judges.classifier import ImageClassifier


class DigitClassifier(ImageClassifier):
    """Two convolutions and two linear layers on the brightness of an image; the defaults are the authors' for MNIST.

    Args:
        attributes, words, accuracy: as in `AttributeClassifier`.
        image_size: height and width of the images in pixels.
        kernel_size, padding: of both convolutions; each is followed by a pooling that halves the image. 3 and 1 suit
            images of 8 pixels.
        channels: width of the two convolutions.
        num_features: width of the layer before the heads.
        dropout: share of the maps of the second convolution, and of the features, that is dropped in training.

    Raises:
        ValueError: `words` does not fit `attributes`, or nothing is left of an image after the convolutions.
    """

    @register_to_config
    def __init__(
        self,
        attributes: dict[str, list[str]],
        words: dict[str, dict[str, list[str]]] | None = None,
        accuracy: dict[str, float] | None = None,
        image_size: int = 28,
        kernel_size: int = 5,
        padding: int = 0,
        channels: tuple[int, int] = (10, 20),
        num_features: int = 50,
        dropout: float = 0.5,
    ):
        super().__init__()
        side = image_size
        for _ in channels:
            side = (side + 2 * padding - kernel_size + 1) // 2
        if side < 1:
            raise ValueError(
                f"images of {image_size} pixels are too small for two convolutions of size {kernel_size} with padding "
                f"{padding}; expected a smaller kernel_size or more padding, such as 3 and 1"
            )
        self.conv1 = nn.Conv2d(1, channels[0], kernel_size, padding=padding)
        self.norm1 = nn.BatchNorm2d(channels[0])
        self.conv2 = nn.Conv2d(channels[0], channels[1], kernel_size, padding=padding)
        self.norm2 = nn.BatchNorm2d(channels[1])
        self.drop_maps = nn.Dropout2d(dropout)
        self.project = nn.Linear(channels[1] * side**2, num_features)
        self.drop_features = nn.Dropout(dropout)
        self._add_heads(attributes, words, num_features)

    def features(self, images: Tensor) -> Tensor:
        self._check_images(images)
        hidden = (images.mean(1, keepdim=True) + 1) / 2  # the authors' pixels: grey, in [0, 1], not normalised further
        hidden = F.relu(F.max_pool2d(self.norm1(self.conv1(hidden)), 2))
        hidden = F.relu(F.max_pool2d(self.drop_maps(self.norm2(self.conv2(hidden))), 2))
        return F.relu(self.project(hidden.flatten(1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self._logits(self.drop_features(self.features(images)))
