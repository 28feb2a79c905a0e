r"""Train the classifier that judges generated images. It never takes part in training what generates them.

The bundled classifier (MNIST from the hub, or a local folder in its layout):
    sa-diffusers train-classifier --config configs/digits_classifier.yaml --data_dir ylecun/mnist
That of Selective Amnesia's MNIST experiments, and the same for 8x8 digits, which needs no download:
    sa-diffusers train-classifier --config configs/mnist_classifier.yaml --data_dir ylecun/mnist
    sa-diffusers train-classifier --config configs/digits8x8_classifier.yaml
The ResNet-34 of its CIFAR10 and STL10 experiments, from ImageNet weights or, without a network, from scratch:
    sa-diffusers train-classifier --config configs/cifar10_classifier.yaml
    sa-diffusers train-classifier --config configs/cifar10_classifier.yaml --pretrained null --input_size null \
        --stem small --learning_rate 1e-3 --lr_scheduler cosine --num_train_steps 15000 --data_dir my_copy_of_cifar10
Your own images, a folder with metadata.jsonl ({"file_name": ..., "digit": "seven", "ink": "red"} a line):
    sa-diffusers train-classifier --data_dir my_images --attributes digit,ink --output_dir runs/my_classifier
"""

from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.evaluation.judges.classifier import Score
from sa_diffusers.io.processes import say
from sa_diffusers.runs.base.classifier import ClassifierConfig, train_and_save_classifier


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ClassifierConfig, argv, description=__doc__)
    with friendly_errors(argv):
        scores = train_and_save_classifier(config)
        for attribute, by_class in scores.items():
            overall, worst = Score.total_of(by_class.values()), min(by_class, key=lambda name: by_class[name].share)
            say(f"{attribute}: {overall} of the held-out images; the worst class is {worst}: {by_class[worst]}")
        say(f"saved {Path(config.output_dir) / 'classifier'}")
