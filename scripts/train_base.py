"""Train a small Stable Diffusion pipeline from captioned images, to forget concepts of afterwards.

The bundled pipeline (MNIST from the hub, or a local folder in its layout):
    accelerate launch scripts/train_base.py --config configs/digits_base.yaml --data_dir ylecun/mnist
Your own images, a folder with metadata.jsonl ({"file_name": ..., "text": ...} a line):
    accelerate launch scripts/train_base.py --data_dir my_images --output_dir runs/my_base --num_train_steps 20000
"""

from pathlib import Path

from sa_diffusers.base_training import BaseConfig, train_base
from sa_diffusers.cli import parse_config


def main() -> None:
    config = parse_config(BaseConfig, description=__doc__)
    if config.dataset == "digits":
        from sa_diffusers.digits import ColoredDigits, load_strokes

        strokes = load_strokes(config.data_dir, "train", Path(config.output_dir) / "data", config.seed)
        data = ColoredDigits(*strokes, copies=config.num_copies, seed=config.seed)
    else:
        from sa_diffusers.data import CaptionedImageFolder

        data = CaptionedImageFolder(config.data_dir, config.resolution)
    pipe = train_base(data, config)
    print(f"saved {Path(config.output_dir) / 'pipeline'}: {type(pipe).__name__}")


if __name__ == "__main__":
    main()
