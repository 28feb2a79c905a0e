"""Compose the prompt lists of the bundled pipeline: what it replays, and labelled prompts to judge it by.

    python scripts/compose_digit_prompts.py
    python scripts/compose_digit_prompts.py --output_dir my_prompts --num_prompts 4000

`replay_prompts.txt` holds captions of the training grammar. `eval_prompts.jsonl` holds the same captions (form "seen")
and the held-out sentence frames (form "held_out"), each with the classes that it names.
"""

import argparse
import json
import random
from pathlib import Path

from sa_diffusers.data.digits.captions import caption, fill, held_out_templates, random_attributes
from sa_diffusers.io.bundled import ASSETS


KEEP = {"digit": 0.8, "ink": 0.7, "background": 0.6, "stroke": 0.6}  # how often an attribute is named
FILLS = 24  # of each held-out frame


def compose(num_prompts: int, seed: int) -> list[dict[str, str]]:
    """Distinct labelled prompts: {"prompt", "form", and the class of each attribute that the prompt names}."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < num_prompts:
        named = {key: value for key, value in random_attributes(rng).items() if rng.random() < KEEP[key]}
        text = caption(named, rng, keep=1.0)
        rows.setdefault(text, {"prompt": text, "form": "seen", **named})
    for template in held_out_templates():
        for _ in range(FILLS):
            named = {key: value for key, value in random_attributes(rng).items() if f"{{{key}}}" in template}
            text = fill(template, named, rng)
            rows.setdefault(text, {"prompt": text, "form": "held_out", **named})
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=ASSETS / "digits", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--num_prompts", type=int, default=2400, help="captions of the grammar (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every choice (default: %(default)s)")
    args = parser.parse_args()
    rows = compose(args.num_prompts, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    replay = [row["prompt"] for row in rows if row["form"] == "seen"]
    (args.output_dir / "replay_prompts.txt").write_text("\n".join(replay) + "\n")
    (args.output_dir / "eval_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(replay)} captions and {len(rows) - len(replay)} held-out prompts in {args.output_dir}")


if __name__ == "__main__":
    main()
