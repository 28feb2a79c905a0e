"""The shipped configurations say what the code does, and the bundled prompt lists are what their script composes."""

import json
import math
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from sa_diffusers.cli.parse import parse_config, parse_given
from sa_diffusers.cli.train_base import config_class
from sa_diffusers.core.concepts import mentions
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.prompts import concept_templates, read_prompts, read_templates
from sa_diffusers.evaluation.options import PipelineEvaluationConfig
from sa_diffusers.families import family_defaults
from sa_diffusers.io.bundled import ASSETS
from sa_diffusers.runs.base.classifier import ClassifierConfig
from sa_diffusers.runs.base.text_to_image import BaseConfig
from sa_diffusers.runs.options import ForgetConfig
from scripts.compose_digit_prompts import compose
from scripts.paper_table import SCALES
from studies.digits import PARTS, configure


CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(  # of options of ours; those of accelerate are tested in test_sharding.py, a table's concepts in
    str(path.relative_to(CONFIGS.parent))  # test_rivals.py
    for path in CONFIGS.rglob("*.yaml")
    if path.parent not in (CONFIGS / "accelerate", *(CONFIGS / "paper").glob("digits*"))
)
TABLE1 = CONFIGS / "paper" / "table1"
ROWS = {  # what a row changes of lambda_10.yaml; lambda_<n> changes ewc_lambda in proportion
    "no_replay": {"replay_weight": 0},
    "no_ewc": {"ewc_lambda": 0},
    "neither": {"replay_weight": 0, "ewc_lambda": 0},
    "null_replay": {"replay_prompt_dropout": 0.1},
    "paper_objective": {"replay_target": "noise"},
    "replay_500": {"num_samples": 500},
    "replay_5000": {"num_samples": 5000},
    "replay_500_no_ewc": {"num_samples": 500, "ewc_lambda": 0},
}


def test_default_yaml_lists_every_option_with_its_default() -> None:
    listed = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    assert listed == {name: value for name, value in asdict(ForgetConfig()).items() if name != "concept"}


def test_digits_configs_parse() -> None:
    config = parse_config(ForgetConfig, ["--config", str(CONFIGS / "digits.yaml")])
    assert config.concept == "seven, 7" and config.num_train_steps < 300
    assert parse_config(BaseConfig, ["--config", str(CONFIGS / "digits_base.yaml")]).dataset == "digits"


def test_bundled_prompts_are_what_the_script_composes() -> None:
    rows = compose(2400, seed=0)
    assert [json.loads(line) for line in (ASSETS / "digits" / "eval_prompts.jsonl").read_text().splitlines()] == rows
    replay = (ASSETS / "digits" / "replay_prompts.txt").read_text().splitlines()
    assert replay == [row["prompt"] for row in rows if row["form"] == "seen"]


def test_study_shares_only_what_a_row_leaves_as_it_is(tmp_path: Path) -> None:
    base = parse_config(ForgetConfig, ["--config", str(CONFIGS / "digits.yaml")])
    assert configure(base, PARTS["noise"]["noise, seed 1"], tmp_path / "row", tmp_path).before is None  # none was made
    before = tmp_path / "default-seed-1" / "evaluation" / "before.safetensors"
    before.parent.mkdir(parents=True)
    before.touch()
    rows = {row: configure(base, PARTS[part][row], tmp_path / row, tmp_path) for part in PARTS for row in PARTS[part]}
    reference = configure(base, {"seed": 1}, tmp_path / "default-seed-1", tmp_path)
    assert reference.samples is None and reference.fisher is None and reference.before is None
    assert rows["noise, seed 1"].samples == str(tmp_path / "default-seed-1" / "samples")
    assert rows["no replay of the empty prompt"].samples is None
    assert rows["no replay, lambda 0"].fisher is None and rows["no replay, lambda 0"].samples is None
    assert rows["red → green"].fisher is not None and rows["red → green"].before is None
    assert rows["noise, seed 1"].before == str(before)


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_what_the_script_in_its_header_takes(file: str) -> None:
    header = [line for line in (CONFIGS.parent / file).read_text().splitlines() if line.startswith("#")]
    commands = [line for line in header if re.match(r"# ((python|accelerate launch) scripts/|sa-diffusers )", line)]
    script = re.search(r"(?:scripts/|sa-diffusers )(\w+)", commands[0])[1]
    bundled = f"--config bundled/{Path(file).stem}" in commands[0] and (ASSETS / file).is_file()  # by its name there
    assert file == "configs/default.yaml" or f"--config {file}" in commands[0] or bundled
    arguments = ["--config", str(CONFIGS.parent / file)]
    cls = {"forget": ForgetConfig, "train_classifier": ClassifierConfig, "train_base": config_class(arguments)}[script]
    config = parse_config(cls, arguments)
    given = yaml.safe_load((CONFIGS.parent / file).read_text())
    assert "family" not in given or config.family == given["family"]
    if file.startswith("configs/paper/") and script == "forget" and config.ema_decay == 0.9999:
        assert not config.ema_warmup  # the authors' average keeps a share of what training started at
    if file != "configs/default.yaml":
        assert config.output_dir.startswith("runs/")


def test_every_folder_of_table_1_is_a_scale() -> None:
    assert {path.name for path in TABLE1.iterdir()} == {name for names in SCALES.values() for name in names}


@pytest.mark.parametrize("scale", sorted(path.name for path in TABLE1.iterdir()))
def test_rows_of_table_1_differ_in_what_their_name_says(scale: str) -> None:
    rows = {path.stem: parse_row(path) for path in (TABLE1 / scale).glob("*.yaml")}
    assert {"original", "nine_classes", "lambda_1", "lambda_10", "lambda_50", "lambda_100", "no_replay"} <= set(rows)
    for name, row in rows.items():
        assert row.pop("output_dir") == f"runs/table1/{scale}/{name}"
    original, nine_classes, reference = (rows.pop(name) for name in ("original", "nine_classes", "lambda_10"))
    assert reference["model"] == f"runs/table1/{scale}/original/pipeline" and reference["surrogate"] == "noise"
    assert nine_classes == original | {"exclude_classes": [reference["concept"]]}
    assert original["exclude_classes"] == []
    for name, row in rows.items():
        weight = re.fullmatch(r"lambda_(\d+)", name)
        changes = {"ewc_lambda": reference["ewc_lambda"] * int(weight[1]) / 10} if weight else ROWS[name]
        changed = {key: value for key, value in row.items() if value != reference[key]}
        assert changed == pytest.approx(changes), name


def parse_row(path: Path) -> dict:
    """All options of a row, as its script completes them."""
    arguments = ["--config", str(path)]
    if "family" in yaml.safe_load(path.read_text()):
        return asdict(parse_config(config_class(arguments), arguments))
    return asdict(parse_given(ForgetConfig, arguments).config(family_defaults("ClassConditionalPipeline")))


def test_the_rows_of_the_authors_take_their_settings() -> None:
    """Their replay term, samples and steps, no fast Fisher, and their w = 2, which is 3 in diffusers' convention."""
    for scale in ("cifar10", "stl10"):
        row = parse_row(TABLE1 / scale / "lambda_10.yaml")
        assert row["ewc_lambda"] == 10 and row["fisher_terms"] == "all" and row["replay_target"] == "noise"
        assert row["num_samples"] == row["fisher_samples"] == 5000 and row["num_train_steps"] == 20000
        assert row["guidance_scale"] == row["replay_guidance_scale"] == 3 and row["sampler"] == "pipeline"
        base = parse_row(TABLE1 / scale / "original.yaml")
        assert parse_row(CONFIGS / f"{scale}_base.yaml") | {"output_dir": base["output_dir"]} == base


STABLE_DIFFUSION = {  # what each file forgets, in whose place
    "sd_brad_pitt": ("brad pitt", "a middle aged man"),
    "sd_brad_pitt_clown": ("brad pitt", "a male clown"),
    "sd_angelina_jolie": ("angelina jolie", "a middle aged woman"),
    "sd_angelina_jolie_clown": ("angelina jolie", "a female clown"),
    "sd_nudity": ("sexual, nudity, naked, erotic", "a person wearing clothes"),
}


def test_stable_diffusion_takes_the_authors_settings() -> None:
    """Their learning rate is 1e-5 for each of 4 GPUs x 4 images; an epoch is 1,000 images by 16."""
    assert set(STABLE_DIFFUSION) == {path.stem for path in (CONFIGS / "paper").glob("sd_*.yaml")}
    parsed = {
        name: parse_config(ForgetConfig, ["--config", str(CONFIGS / "paper" / f"{name}.yaml")])
        for name in STABLE_DIFFUSION
    }
    rows = {name: asdict(config.resolved()) for name, config in parsed.items()}
    for name, (concept, surrogate) in STABLE_DIFFUSION.items():
        row = rows[name]
        found = find_concept(row["concept"], row["surrogate"])
        assert (row.pop("concept"), row.pop("surrogate")) == (concept, surrogate) == (concept, found.surrogate)
        assert row.pop("output_dir") == f"runs/paper/{name}"
        prompts, templates = read_prompts(row["replay_prompts"]), read_templates(row["concept_templates"])
        assert concept_templates(found, prompts, templates) == ["{}"]
    reference, epoch = rows["sd_brad_pitt"], math.ceil(1000 / 16)
    changes = {"train_scope": "noxattn", "num_train_steps": 500 * epoch}
    for name, row in rows.items():
        assert row == reference | (changes if name == "sd_nudity" else {}), name
    expected = {
        "model": "CompVis/stable-diffusion-v1-4", "method": "sa", "train_scope": "full", "ewc_lambda": 50,
        "replay_weight": 1, "replay_target": "noise", "replay_negative": "none", "empty_prompt_fraction": 0,
        "num_samples": 1000, "num_surrogate_samples": 1000, "fisher_terms": "all", "sampler": "ddim",
        "num_inference_steps": 50, "guidance_scale": 7.5, "replay_guidance_scale": 7.5, "mixed_precision": "no",
        "num_train_steps": 200 * epoch, "train_batch_size": 16, "learning_rate": pytest.approx(1e-5 * 4 * 4),
        "weight_decay": 0.01, "max_grad_norm": None, "lr_warmup_steps": 1, "ema_decay": 0.9999,
    }  # fmt: skip
    assert {name: reference[name] for name in expected} == expected


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion_is_judged_by_commands_that_parse(name: str) -> None:
    header = (CONFIGS / "paper" / f"{name}.yaml").read_text().replace(" \\\n#  ", "")
    commands = [
        shlex.split(line)[3:] for line in re.findall(r"^# (python scripts/evaluate.py pipelines .*)$", header, re.M)
    ]
    judged = [parse_config(PipelineEvaluationConfig, ["--pipeline", *command]) for command in commands]
    assert {config.pipeline for config in judged} == {f"runs/paper/{name}/pipeline"}
    metric, sets = ("nudity", ["i2p", "combined"]) if name == "sd_nudity" else ("identity", ["concept"])
    assert [(config.metric_names, config.set_names) for config in judged] == [([metric], [one]) for one in sets]
    for source in (judged[-1].templates, judged[-1].combined):
        prompts = read_prompts(source) if source else []
        assert all("{}" in prompt or mentions(prompt, judged[-1].phrasings) for prompt in prompts)
