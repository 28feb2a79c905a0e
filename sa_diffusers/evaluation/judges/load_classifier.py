"""Load a saved classifier of any kind: its configuration says which."""

from pathlib import Path

import torch

from sa_diffusers.evaluation.judges.classifier import AttributeClassifier, ImageClassifier
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judges.resnet_classifier import ResNetClassifier
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import explain_load_errors


CLASSES = {cls.__name__: cls for cls in (AttributeClassifier, DigitClassifier, ResNetClassifier)}


def load_classifier(source: str | Path) -> ImageClassifier:
    """A classifier from a local folder, the hub, or bundled/<name>, in float32, in eval mode, on the CPU.

    Raises:
        ValueError: its configuration names a class that is none of the classifiers here.
        ModelLoadError: there is no configuration or no weights; the message says what to do.
    """
    folder = resolve(str(source))
    with explain_load_errors(folder):
        name = AttributeClassifier.load_config(folder).get("_class_name")  # any of them reads it: it is plain JSON
        if name in CLASSES:
            return CLASSES[name].from_pretrained(folder, dtype=torch.float32).eval()
    raise ValueError(
        f"expected a classifier ({' or '.join(CLASSES)}), got {name} in {source}; train one with "
        "`sa-diffusers train-classifier`"
    )
