"""Train a base model, to forget concepts of afterwards.

The bundled text-to-image pipeline (MNIST from the hub, or a local folder in its layout):
    sa-diffusers train-base --config configs/digits_base.yaml --data_dir ylecun/mnist
Your own images, a folder with metadata.jsonl ({"file_name": ..., "text": ...} a line):
    sa-diffusers train-base --data_dir my_images --output_dir runs/my_base --num_train_steps 20000
The conditional VAE of the MNIST experiments; with configs/digits8x8_cvae.yaml in seconds, offline:
    sa-diffusers train-base --config configs/mnist_cvae.yaml
Class-conditional diffusion; with configs/digits8x8_base.yaml in two minutes, offline:
    sa-diffusers train-base --config configs/cifar10_base.yaml
A masked autoencoder that fills holes of pictures; with configs/digits_inpaint_base.yaml the bundled one:
    sa-diffusers train-base --family masked_autoencoder --dataset pictures --data_dir my_folder
One that fills them by tokens of a codebook:
    sa-diffusers train-base --config configs/digits_token_inpaint_base.yaml --data_dir ylecun/mnist
One that denoises pixels, and also colours and sharpens:
    sa-diffusers train-base --config configs/digits_pixel_inpaint_base.yaml --data_dir ylecun/mnist

`--family class_conditional --help`, and so for the others, lists the options of one.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.io.processes import say
from sa_diffusers.runs.base.completion import MaskedAutoencoderConfig, train_masked_autoencoder
from sa_diffusers.runs.base.labelled import (
    ClassConditionalConfig,
    ConditionalVAEConfig,
    LabelledBaseConfig,
    negative_elbo,
    train_class_conditional,
    train_conditional_vae,
)
from sa_diffusers.runs.base.pixels import PixelInpaintConfig, train_pixel_inpaint
from sa_diffusers.runs.base.text_to_image import BaseConfig, train_base
from sa_diffusers.runs.base.tokens import TokenInpaintConfig, train_token_inpaint


CONFIGS = {
    "text_to_image": BaseConfig,
    "conditional_vae": ConditionalVAEConfig,
    "class_conditional": ClassConditionalConfig,
    "masked_autoencoder": MaskedAutoencoderConfig,
    "token_inpaint": TokenInpaintConfig,
    "pixel_inpaint": PixelInpaintConfig,
}
COMPLETING = {
    MaskedAutoencoderConfig: train_masked_autoencoder,
    TokenInpaintConfig: train_token_inpaint,
    PixelInpaintConfig: train_pixel_inpaint,
}


def config_class(argv: list[str]) -> type[BaseConfig | LabelledBaseConfig]:
    """The options that belong to `--family`, given on the command line or in a YAML file; errors are left to them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--family")
    given = parser.parse_known_args(argv)[0]
    families = [given.family]
    for path in reversed(given.config):
        with suppress(ValueError):
            families.append(read_yaml(path).get("family"))
    return CONFIGS.get(next((name for name in families if name), "text_to_image"), BaseConfig)


def train_text_to_image(config: BaseConfig) -> None:
    if config.dataset == "digits":
        from sa_diffusers.data.digits.images import ColoredDigits, load_strokes

        strokes = load_strokes(config.data_dir, "train", Path(config.output_dir) / "data", config.seed)
        data = ColoredDigits(*strokes, config.num_copies, config.seed, config.exclude_classes)
    else:
        from sa_diffusers.data.images import CaptionedImageFolder

        data = CaptionedImageFolder(config.data_dir, config.resolution)
    train_base(data, config)


def train_labelled(config: LabelledBaseConfig) -> None:
    from sa_diffusers.data.labelled_images import load_labelled_images

    if type(config) in COMPLETING:
        COMPLETING[type(config)](config)
        return
    data = load_labelled_images(config.dataset, config.data_dir, config.split).without(config.exclude_classes)
    if isinstance(config, ClassConditionalConfig):
        train_class_conditional(data, config)
        return
    test = load_labelled_images(config.dataset, config.data_dir, "test").without(config.exclude_classes)
    pipeline = train_conditional_vae(data, config)
    for split, images in {config.split: data, "test": test}.items():
        say(f"negative ELBO, {split}: {negative_elbo(pipeline, images).mean():.2f} nats an image")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse_config(config_class(argv), argv, description=__doc__)
    with friendly_errors(argv):
        train_labelled(config) if isinstance(config, LabelledBaseConfig) else train_text_to_image(config)
        say(f"saved {Path(config.output_dir) / 'pipeline'}")
