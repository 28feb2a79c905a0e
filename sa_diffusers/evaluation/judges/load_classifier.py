"""Load a saved classifier of any kind: its configuration says which."""

from pathlib import Path

import torch

from sa_diffusers.evaluation.judges.classifier import AttributeClassifier, ImageClassifier
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judges.resnet_classifier import ResNetClassifier


CLASSES = {cls.__name__: cls for cls in (AttributeClassifier, DigitClassifier, ResNetClassifier)}


def load_classifier(source: str | Path) -> ImageClassifier:
    """A classifier from a local folder or the hub, in float32, in eval mode, on the CPU.

    Raises:
        ValueError: its configuration names a class that is none of the classifiers here.
        OSError: there is no configuration or no weights.
    """
    name = AttributeClassifier.load_config(str(source)).get("_class_name")  # any of them reads it: it is plain JSON
    if name not in CLASSES:
        raise ValueError(
            f"expected a classifier ({' or '.join(CLASSES)}), got {name} in {source}; train one with "
            "scripts/train_classifier.py"
        )
    return CLASSES[name].from_pretrained(str(source), dtype=torch.float32).eval()
