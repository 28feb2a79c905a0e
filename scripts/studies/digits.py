"""Forgetting on the bundled digits: the runs of each part, by configs/digits.yaml with overrides, and their table."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sa_diffusers.io.atomic_files import atomic_path, write_json
from sa_diffusers.report.tables import markdown_table
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from studies.figures import save_histories


LAMBDA = 0.5  # of configs/digits.yaml
NOISE = {"surrogate": "noise"}
# All weights in place of low-rank changes of them, at a rate that suits them.
FULL = {"lora_rank": None, "learning_rate": 3e-4}
FIRM = FULL | {"ewc_lambda": 10 * LAMBDA, "replay_weight": 3.0, "num_train_steps": 200}
# The paper's objective alone: replay towards the drawn noise, with more samples and steps, which it needs.
PAPER = FULL | {"replay_target": "noise", "num_samples": 480, "num_surrogate_samples": 400, "num_train_steps": 200}
PLAIN_NOISE = NOISE | PAPER
NO_REPLAY = PLAIN_NOISE | {"replay_weight": 0.0}
# The LoRA of configs/digits.yaml spares attributes most. All weights also change what is drawn where none is named,
# and with a rate that falls they also spare attributes.
LONG = FULL | {"num_train_steps": 200}
FALLING = LONG | {"lr_scheduler": "linear", "learning_rate": 5e-4}
FIRM_LORA = {
    "replay_weight": 5.0, "num_train_steps": 320, "negative_guidance_scale": 3.0, "lr_scheduler": "linear",
    "learning_rate": 5e-3,
}  # fmt: skip
COLOUR = FULL | {"num_train_steps": 280, "ewc_lambda": LAMBDA / 5, "learning_rate": 6e-4}
CONCEPTS = {
    "zero, 0 → eight": FALLING, "one, 1 → three": {}, "two, 2 → six": LONG,
    "three, 3 → five": FIRM_LORA | {"replay_weight": 3.0},
    "four, 4 → nine": LONG, "five, 5 → eight": LONG, "six, 6 → zero": {}, "eight, 8 → five": FIRM_LORA,
    "nine, 9 → four": LONG, "red → green": COLOUR,
}  # fmt: skip
# part: {row: overrides of configs/digits.yaml}
PARTS: dict[str, dict[str, dict]] = {
    "default": {f"default, seed {seed}": {"seed": seed} for seed in range(3)},
    "weights": {f"all weights, seed {seed}": FULL | {"seed": seed} for seed in range(3)},
    # Noise leaves the classifier guessing even where EWC and replay hold more, and so costs the others less. The worst
    # of nine classes is a noisy number of 100 pictures each: here it gets 200.
    "noise": {f"noise, seed {seed}": NOISE | FIRM | {"eval_images_class": 200, "seed": seed} for seed in range(3)},
    # Each by the recipe that did best for it, looked at with this evaluation.
    "concepts": {
        row: dict(zip(("concept", "surrogate"), row.split(" → "), strict=True)) | recipe
        for row, recipe in CONCEPTS.items()
    },
    "ablations": {
        "replay, lambda x1": PLAIN_NOISE,
        "no replay, lambda 0": NO_REPLAY | {"ewc_lambda": 0.0},
        "no replay, lambda x1": NO_REPLAY,
        "no replay, lambda x10": NO_REPLAY | {"ewc_lambda": 10 * LAMBDA},
        "no replay, lambda x100": NO_REPLAY | {"ewc_lambda": 100 * LAMBDA},
        "replay, lambda x100": PLAIN_NOISE | {"ewc_lambda": 100 * LAMBDA},
        "no replay of the empty prompt": PLAIN_NOISE | {"empty_prompt_fraction": 0.0},
        "replay drawn at the sampling guidance": PLAIN_NOISE | {"replay_guidance_scale": 2.5},
        "replay that may show the concept": PLAIN_NOISE | {"replay_negative": "none"},
        "noise, xattn": PLAIN_NOISE | {"train_scope": "xattn"},
        "noise, noxattn": PLAIN_NOISE | {"train_scope": "noxattn"},
        "seven → nine, which looks alike": PAPER | {"surrogate": "nine"},
    },
}
# Overrides that change the samples, so that those of the reference run cannot be shared.
OWN_SAMPLES = ("empty_prompt_fraction", "replay_guidance_scale", "num_samples")
COLUMNS = {
    "concept_probability": "P(concept)",
    "concept_probability_unseen": "unseen words",
    "concept_rate_when_unnamed": "not named",
    "retained_accuracy": "others",
    "retained_worst_accuracy": "worst other",
    "attribute_accuracy": "their attributes",
    "concept_attribute_accuracy": "its attributes",
    "noise_probability": "P(noise)",
}


def configure(base: ForgetConfig, overrides: dict, output_dir: Path, study_dir: Path) -> ForgetConfig:
    """The row's configuration, sharing what it can with the default run of its seed."""
    config = replace(base, **overrides, output_dir=str(output_dir)).resolved()
    reference = study_dir / f"default-seed-{config.seed}"
    if output_dir == reference:
        return config
    before = reference / "evaluation" / "before.safetensors"  # absent where what ships with the model served
    if config.concept != "red" and before.is_file():  # red has other classes: no picture that the reference asks for
        config = replace(config, before=str(before))
    if any(overrides.get(key, getattr(base, key)) != getattr(base, key) for key in OWN_SAMPLES):
        return config
    fisher = str(reference / "fisher.safetensors") if config.ewc_lambda else None
    return replace(config, samples=str(reference / "samples"), fisher=fisher)


def cell(metrics: dict, key: str) -> str:
    """A measure before → after; of several attributes the one that lost most."""
    before, after = metrics["before"].get(key), metrics["after"].get(key)
    if isinstance(after, dict):
        worst = min(after, key=lambda name: after[name] - before[name], default=None)
        before, after = (None, None) if worst is None else (before[worst], after[worst])
    if after is None:
        return "–"
    return f"{after:.3f}" if key == "noise_probability" else f"{before:.3f} → {after:.3f}"


def run_folder(output_dir: Path, part: str, row: str) -> Path:
    """The folder of a row: "noise, seed 0" -> noise-seed-0."""
    text = row if row.startswith(part) else f"{part} {row}"
    return output_dir / "-".join("".join(c if c.isalnum() else " " for c in text).split()).lower()


def run_parts(base: ForgetConfig, wanted: Sequence[str], output_dir: Path) -> None:
    """Run the rows of some parts that are not done, after the default run of seed 0, whose files others share."""
    for part in ["default", *(part for part in wanted if part != "default")]:
        for row, overrides in PARTS[part].items():
            folder = run_folder(output_dir, part, row)
            needed = part in wanted or overrides["seed"] == 0
            if needed and not (folder / "metrics.json").exists():
                print(f"\n=== {row} -> {folder}", flush=True)
                run_forgetting(configure(base, overrides, folder, output_dir))


def write_study(output_dir: Path) -> str:
    """Collect what is finished of every part in study.json, study.md and curves.png; the tables as Markdown."""
    results, histories = {}, {}
    for part, rows in PARTS.items():
        for row in rows:
            folder = run_folder(output_dir, part, row)
            if (folder / "metrics.json").exists():
                results.setdefault(part, {})[row] = json.loads((folder / "metrics.json").read_text())
                if part in ("default", "noise", "ablations") and "seed 1" not in row and "seed 2" not in row:
                    histories[row] = json.loads((folder / "history.json").read_text())
    text = "".join(f"\n### {part}\n\n{table(rows)}\n" for part, rows in results.items())
    write_json(results, output_dir / "study.json")
    with atomic_path(output_dir / "study.md") as temporary:
        temporary.write_text(text)
    panels = {"concept_probability": "concept probability", "retained_accuracy": "retained accuracy"}
    save_histories(histories, panels, output_dir / "curves.png")
    return text


def table(rows: dict[str, dict]) -> str:
    """Markdown of a part: a row a run, each cell before → after."""
    cells = [
        [row, *(cell(metrics, key) for key in COLUMNS), f"{metrics['seconds']['train']:.0f}"]
        for row, metrics in rows.items()
    ]
    return markdown_table(["run", *COLUMNS.values(), "train s"], cells)
