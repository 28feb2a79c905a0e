"""The shipped configurations say what the code does, and the bundled prompt lists are what their script composes."""

import json
from dataclasses import asdict
from pathlib import Path

import yaml

from sa_diffusers.base_training import BaseConfig
from sa_diffusers.bundled import ASSETS
from sa_diffusers.cli import parse_config
from sa_diffusers.config import ForgetConfig
from scripts.compose_digit_prompts import compose
from scripts.digits_study import PARTS, configure


CONFIGS = Path(__file__).parents[1] / "configs"


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
    rows = {row: configure(base, PARTS[part][row], tmp_path / row, tmp_path) for part in PARTS for row in PARTS[part]}
    reference = configure(base, {"seed": 1}, tmp_path / "default-seed-1", tmp_path)
    assert reference.samples is None and reference.fisher is None and reference.before is None
    assert rows["noise, seed 1"].samples == str(tmp_path / "default-seed-1" / "samples")
    assert rows["no replay of the empty prompt"].samples is None
    assert rows["no replay, lambda 0"].fisher is None and rows["no replay, lambda 0"].samples is None
    assert rows["red → green"].fisher is not None and rows["red → green"].before is None
    assert rows["noise, seed 1"].before is None  # more pictures a class
    again = configure(base, {"num_train_steps": 5}, tmp_path / "again", tmp_path)
    assert again.before == str(tmp_path / "default-seed-0" / "evaluation" / "before.safetensors")
