r"""Try to bring a forgotten concept back, by its prompt, its weights or a picture of it, and judge the pictures.

The bundled digits, offline, in minutes, after `sa-diffusers forget --config bundled/digits`:
    sa-diffusers attack runs/digits-seven --original bundled/digits/pipeline --concept "seven, 7" \
        --classifier bundled/digits/classifier
By words that anybody can type, beside a model that never learned the concept:
    sa-diffusers attack runs/digits-seven --original bundled/digits/pipeline --concept "seven, 7" \
        --classifier bundled/digits/classifier --attack text --num_tokens 3 --control runs/digits_without_seven \
        --output_dir runs/attack_text
By training, few bits, a merge, or a picture of the concept: --attack relearn, quantized, merged, inversion,
image_to_image or inpainting. By all of these: --all
By training on something else: --attack relearn --relearn_prompts "a three" "a red one"
That model is trained like the original, without the concept:
    sa-diffusers train-base --config configs/digits_base.yaml --data_dir ylecun/mnist \
        --exclude_classes seven --output_dir runs/digits_without_seven

The original draws the targets, and every model is attacked in the same way: the original as the ceiling, the control
as the floor. Pictures are drawn as by the run that made the forgotten pipeline, unless told otherwise. Writes
attack.json, attack.md, report.html, and what was found. To resume, run the same command again.
"""

import sys

from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--forgotten", *argv]
    config = parse_config(AttackConfig, argv, description=__doc__)
    with friendly_errors(argv):
        from pathlib import Path

        from sa_diffusers.attacks.results import markdown
        from sa_diffusers.attacks.run import run_attack
        from sa_diffusers.io.processes import say

        result = run_attack(config)
        say(f"\n{markdown(result)}\nreport: {(Path(config.output_dir) / 'report.html').resolve()}")
