"""Measure which way a digit enters a model: through the tokens of its prompt, or through the pooled vector.

    python scripts/text_paths.py
    python scripts/text_paths.py --model runs/digits_flow_base/pipeline --output_dir runs/my_text_paths

Pictures are drawn by tokens of one prompt and the pooled vector of another. Writes text_paths.json.
"""

from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.families import get_family
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.loading import load_pipeline
from studies.rows import table_of
from studies.text_paths import TextPathsConfig, measure


def main() -> None:
    config = parse_config(TextPathsConfig, description=__doc__)
    with friendly_errors():
        family = get_family(load_pipeline(config.model, None, None, "float32"))
        rows = measure(family, load_classifier(config.classifier).eval().to(family.device), config)
        path = Path(config.output_dir) / "text_paths.json"
        write_json({"model": config.model, "rows": rows}, path)
        print(f"{table_of(rows)}saved {path}")


if __name__ == "__main__":
    main()
