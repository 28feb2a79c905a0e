"""Configurations: precedence, refusals and the way back to YAML."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.forget import over_its_family
from sa_diffusers.cli.parse import parse_config, parse_given
from sa_diffusers.io.configuration import config_from_dict, config_to_yaml
from sa_diffusers.runs.options import ForgetConfig


@dataclass
class Config:
    model: str = field(default="base", metadata={"help": "Folder or hub id; 100 % of it is loaded."})
    surrogate: str | None = field(default=None, metadata={"help": "What takes the concept's place."})
    method: Literal["selective_amnesia", "ewc"] = field(default="ewc", metadata={"help": "The objective."})
    learning_rate: float = field(default=1e-5, metadata={"help": "As written."})
    ewc_lambda: float | None = field(default=None, metadata={"help": "Weight of the penalty."})
    num_steps: int = field(default=10, metadata={"help": "Optimiser steps."})
    use_ema: bool = field(default=False, metadata={"help": "Average the weights."})
    overwrite: bool = field(default=True, metadata={"help": "Start again."})
    classifier: list[str] = field(default_factory=lambda: ["bundled"], metadata={"help": "For evaluation."})
    replay: list[str] | None = field(default=None, metadata={"help": "Prompts."})

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {self.num_steps}")


@dataclass
class Required:
    data_dir: str = field(metadata={"help": "Folder of images."})
    seed: int = field(default=0, metadata={"help": "Seed."})


@pytest.fixture
def write_yaml(tmp_path):
    def write(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error_of(capsys, *argv: str, cls: type = Config) -> str:
    """The message on stderr of a command line that must be refused."""
    with pytest.raises(SystemExit) as exit_info:
        parse_config(cls, list(argv))
    assert exit_info.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    return streams.err


def test_defaults_alone():
    assert parse_config(Config, []) == Config()


def test_command_line_beats_later_file_beats_earlier_file_beats_defaults(write_yaml):
    first = write_yaml("model: first\nnum_steps: 20\nsurrogate: a dog\n", "first.yaml")
    second = write_yaml("num_steps: 30\nsurrogate: a cat\n", "second.yaml")
    config = parse_config(Config, ["--surrogate", "a horse", "--config", first, "--config", second])
    assert config == Config(model="first", num_steps=30, surrogate="a horse")


@pytest.mark.parametrize("position", ["before", "after"])
def test_position_of_config_does_not_matter(write_yaml, position):
    file = ["--config", write_yaml("num_steps: 20\n")]
    flags = ["--num_steps", "40"]
    assert parse_config(Config, file + flags if position == "before" else flags + file).num_steps == 40


def test_command_line_switches_a_boolean_of_the_file(write_yaml):
    path = write_yaml("use_ema: true\noverwrite: true\n")
    config = parse_config(Config, ["--config", path, "--use_ema", "false", "--no_overwrite"])
    assert (config.use_ema, config.overwrite) == (False, False)


def test_command_line_lists_replace_and_can_be_repeated(write_yaml):
    path = write_yaml("classifier: [from_file]\n")
    assert parse_config(Config, ["--config", path]).classifier == ["from_file"]
    argv = ["--config", path, "--classifier", "a", "b", "--classifier", "c", "--replay", "x"]
    config = parse_config(Config, argv)
    assert (config.classifier, config.replay) == (["a", "b", "c"], ["x"])
    assert Config().classifier == ["bundled"]


def test_required_field_may_come_from_either_place(write_yaml, capsys):
    assert parse_config(Required, ["--data_dir", "pictures"]).data_dir == "pictures"
    assert parse_config(Required, ["--config", write_yaml("data_dir: pictures\n")]).data_dir == "pictures"
    assert "--data_dir" in error_of(capsys, cls=Required)
    with pytest.raises(ValueError, match="expected a value for data_dir"):
        config_from_dict(Required, {"seed": 1})


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 2", "learning_rate", 2.0),
        ("ewc_lambda: 5e3", "ewc_lambda", 5000.0),
        ("ewc_lambda: null", "ewc_lambda", None),
        ("surrogate: noise", "surrogate", "noise"),
        ("method: selective_amnesia", "method", "selective_amnesia"),
        ("use_ema: yes", "use_ema", True),
        ("classifier: []", "classifier", []),
        ("replay: [a, b]", "replay", ["a", "b"]),
    ],
)
def test_yaml_values(write_yaml, line, name, expected):
    value = getattr(parse_config(Config, ["--config", write_yaml(line)]), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model: 7.5", "model: expected str, got 7.5 (float)"),
        ("model: null", "model: expected str, got null"),
        ("surrogate: [a]", "surrogate: expected str | None, got ['a'] (list)"),
        ("method: other", "method: expected one of 'selective_amnesia', 'ewc', got 'other' (str)"),
        ("learning_rate: fast", "learning_rate: expected float, got 'fast' (str)"),
        ("learning_rate: true", "learning_rate: expected float, got True (bool)"),
        ("num_steps: 1.5", "num_steps: expected int, got 1.5 (float)"),
        ("num_steps: true", "num_steps: expected int, got True (bool)"),
        ("use_ema: 1", "use_ema: expected bool, got 1 (int)"),
        ("classifier: 1", "classifier: expected list[str], got 1 (int)"),
        ("classifier: [1.5]", "classifier: expected list[str], got [1.5] (list)"),
        ("num_step: 3", "unknown option 'num_step'; did you mean 'num_steps'?"),
        ("3: 3", "unknown option 3 (--help all explains every option)"),
        ("- a", "expected lines of `option: value`, got ['a'] (list)"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_refused_yaml_names_file_and_reason(write_yaml, capsys, line, message):
    path = write_yaml(line)
    error = error_of(capsys, "--config", path)
    assert path in error
    assert message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_step", "3"], "unknown argument '--num_step'; did you mean '--num_steps'?"),
        (["--learning", "3"], "unknown argument '--learning'; did you mean"),
        (["--nun_steps=3"], "did you mean '--num_steps'?"),
        (["stray"], "unknown argument 'stray'"),
        (["--num_steps", "many"], "invalid int value: 'many'"),
        (["--method", "other"], "invalid choice: 'other'"),
        (["--num_steps", "0"], "num_steps: expected at least 1, got 0"),
        (["--config", "absent.yaml"], "cannot read absent.yaml"),
        (["--config"], "expected one argument"),
    ],
)
def test_refused_command_lines(capsys, argv, message):
    assert message in error_of(capsys, *argv)


def test_empty_file_changes_nothing(write_yaml):
    assert parse_config(Config, ["--config", write_yaml("# nothing\n")]) == Config()


def test_round_trip(tmp_path):
    config = Config(
        model="no", surrogate="tête-à-tête: 1e-4", learning_rate=1e-10, ewc_lambda=50.0, replay=["7", "{}", ""]
    )
    path = tmp_path / "resolved.yaml"
    config_to_yaml(config, path)
    assert parse_config(Config, ["--config", str(path)]) == config


def test_help_shows_every_option_with_the_default_that_would_be_used(write_yaml, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(Config, ["--config", write_yaml("num_steps: 77\n"), "--help"], description="Makes it forget.")
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Makes it forget." in text
    assert "--config FILE" in text
    assert "100 % of it is loaded. (default: base)" in text
    assert "Optimiser steps. (default: 77)" in text
    for option in Config.__dataclass_fields__.values():
        assert f"--{option.name}" in text
        assert option.metadata["help"] in text


@dataclass
class Weights(Config):
    """How strong it is. And more of that."""

    strength: float = field(default=0.5, metadata={"help": "How strong.", "everyday": True})
    careful: bool = field(default=True, metadata={"help": "Be careful."})

    @classmethod
    def topics(cls):
        return {"care": ("what it takes.", ["careful"])}


@pytest.mark.parametrize(
    ("asked", "shown", "hidden"),
    [
        (["--help"], ["How strong it is:", "--strength X"], ["--careful", "--model", "And more"]),
        (["-h", "care"], ["care: what it takes.", "--strength X", "--careful, --no_careful"], ["--model"]),
        (["--help=all"], ["--model TEXT", "--num_steps N", "--careful, --no_careful"], ["--num-steps", "--no-"]),
    ],
)
def test_help_shows_in_groups_what_was_asked_for_once(asked, shown, hidden, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(Weights, asked)
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert [part for part in shown if part not in text] == []
    assert [part for part in hidden if part in text] == []
    assert text.count("Be careful.") <= 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["forget"], {"--concept", "--surrogate", "--model", "--method", "--num_train_steps", "--classifier"}),
        (["attack"], {"--forgotten", "--original", "--concept", "--classifier", "--all"}),
        (["evaluate", "pipelines"], {"--pipeline", "--compare", "--concept", "--classifier", "--metrics"}),
    ],
)
def test_help_of_large_commands_is_about_a_dozen_and_all_in_groups(words, named, capsys):
    from sa_diffusers.__main__ import main

    found = []
    for asked in ["--help"], ["--help", "all"]:
        with pytest.raises(SystemExit):
            main([*words, *asked])
        _, *groups = re.split(r"^(?=\w.*:$)", capsys.readouterr().out.partition("\noptions:")[2], flags=re.MULTILINE)
        found.append([re.findall(r"^  (--\w+)", group, flags=re.MULTILINE) for group in groups])
    everyday, whole = found
    assert named <= set(sum(everyday, [])) and len(sum(everyday, [])) <= 13
    assert len(whole) >= 6 and max(map(len, whole)) <= 21
    assert len(sum(whole, [])) > 30


@pytest.mark.parametrize("command", ["train-base", "train-classifier"])
def test_help_of_commands_without_everyday_options_shows_all(command, capsys):
    from sa_diffusers.__main__ import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert all(f"  --{name}" in text for name in ("data_dir", "output_dir", "num_train_steps", "mixed_precision"))


def test_help_of_methods_is_the_list_alone(capsys):

    with pytest.raises(SystemExit):
        parse_config(ForgetConfig, ["--help", "methods"])
    text = capsys.readouterr().out
    assert "\n    sa: " in text and "  --" not in text


def test_help_of_an_unknown_topic(capsys):
    assert "one of all, care; got 'cares'" in error_of(capsys, "--help", "cares", cls=Weights)


def test_dashes_and_underscores_are_the_same_option():
    assert parse_config(Weights, ["--num-steps", "3", "--no-careful"]) == Weights(num_steps=3, careful=False)


def test_a_file_that_ships_and_one_that_does_not(capsys):

    assert parse_config(ForgetConfig, ["--config", "bundled/digits"]).concept == "seven, 7"
    assert "bundled/configs/nine.yaml does not ship" in error_of(capsys, "--config", "bundled/nine", cls=ForgetConfig)


def test_the_command_chooses_by_its_first_word(capsys):
    from sa_diffusers.__main__ import COMMANDS, main

    main(["--help"])
    overview = capsys.readouterr().out
    for word in COMMANDS:
        assert word in overview
        for kind in ([], *({"evaluate": [["run"]], "convert": [["fisher"]]}.get(word, []))):
            with pytest.raises(SystemExit) as end:
                main([word, *kind, "--help"])
            assert end.value.code == 0
            told = capsys.readouterr().out
            assert f"sa-diffusers {word}" in told
        assert "--quiet" in told and "--log_json FILE" in told and "--log-json" not in told  # of every command, once
    with pytest.raises(SystemExit) as end:
        main(["forgot"])
    assert end.value.code == 2 and "unknown command 'forgot'" in capsys.readouterr().err


def test_usage_and_errors_name_the_subcommand(capsys):
    from sa_diffusers.__main__ import main

    for argv, says in (
        (["--help"], "usage: sa-diffusers evaluate run [--config"),
        ([], "sa-diffusers evaluate run: error"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", "run", *argv])
        assert says in "".join(capsys.readouterr())


def test_the_overview_imports_nothing_that_takes_seconds():
    code = "import sys; from sa_diffusers.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_config_from_dict():
    assert config_from_dict(Config, {"learning_rate": "1e-4"}) == Config(learning_rate=1e-4)
    with pytest.raises(ValueError, match="options: unknown option 'lr'"):
        config_from_dict(Config, {"lr": 1})
    with pytest.raises(ValueError, match="options: num_steps: expected int, got 'a'"):
        config_from_dict(Config, {"num_steps": "a"})
    with pytest.raises(ValueError, match="at least 1"):
        config_from_dict(Config, {"num_steps": 0})


def test_a_field_type_that_cannot_be_checked_is_a_bug():
    @dataclass
    class Unsupported:
        mapping: dict = field(default_factory=dict)

    with pytest.raises(TypeError, match="cannot be of type dict"):
        config_from_dict(Unsupported, {"mapping": {}})


def test_a_word_and_an_item_stand_for_themselves(write_yaml):
    """`classifier: a` is a list of one, `model: 7` the text "7"."""
    config = parse_config(Config, ["--config", write_yaml("classifier: a\nmodel: 7")])
    assert config.classifier == ["a"] and config.model == "7"


def test_null_on_the_command_line_is_none(write_yaml):
    config = parse_config(Config, ["--config", write_yaml("surrogate: a man"), "--surrogate", "null"])
    assert config.surrogate is None
    chosen = parse_config(ForgetConfig, ["--concept", "seven", "--mixed_precision", "null", "--start", "null"])
    assert (chosen.mixed_precision, chosen.start) == (None, None)
    with pytest.raises(SystemExit):
        parse_config(ForgetConfig, ["--concept", "seven", "--start", "nowhere"])


KINDS = {"diffusion": "ClassConditionalPipeline", "vae": "ConditionalVAEPipeline"}


@pytest.mark.parametrize(
    ("kind", "argv", "found"),
    [
        ("diffusion", ["--snapshot_steps", "200", "400"], {"num_train_steps": 400}),
        ("diffusion", ["--ema_warmup", "false"], {"ema_decay": 0.98}),
        ("vae", ["--latents", "drawn"], {"fresh_samples": True}),
        ("vae", ["--negative_guidance_scale", "1.0"], {"replay_negative": "none"}),
        (None, ["--method", "encoder", "--noise", "gaussian", "--noise_rank", "4"], {"surrogate": "noise"}),
    ],
)
def test_options_are_checked_over_those_of_the_models_kind(kind, argv, found, tmp_path):
    model = "bundled/digits_inpaint/pipeline"
    if kind is not None:
        model = str(tmp_path)
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": KINDS[kind]}))
    config = over_its_family(parse_given(ForgetConfig, ["--model", model, *argv]))
    assert {name: getattr(config, name) for name in found} == found


def test_help_keeps_the_lines_of_the_description(capsys):
    commands = "Forgets:\n    python forget.py --concept dog\n    python forget.py --concept cat"
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"], description=commands)
    assert commands in capsys.readouterr().out


def test_help_is_advised_once(capsys):
    assert error_of(capsys, "--zzzzz", "3").count("--help") == 1


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("error", "advised"), [(FULL, True), (OSError("no such file"), False)])
def test_a_full_card_ends_in_advice(capsys, error, advised):
    with pytest.raises(SystemExit, match="1"), friendly_errors():
        raise error
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {error}") and "Traceback" not in shown
    assert ("--gradient_checkpointing" in shown) == advised


def test_the_handler_of_a_signal_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises((KeyError, SystemExit)), friendly_errors():
            assert signal.getsignal(signal.SIGTERM) is not before
            raise error
    assert signal.getsignal(signal.SIGTERM) is before


PAGES = """
import resource, torch
{first}
def work():
    kept = [torch.zeros(size) for size in range(500_000, 1_000_000, 50_000)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
work()
before = faults()
for _ in range(20):
    work()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_command_keeps_the_pages_of_tensors_that_it_frees(monkeypatch):
    for name in [one for one in os.environ if one.startswith("MALLOC_") or one == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)

    def faults(first: str) -> int:
        command = [sys.executable, "-c", PAGES.format(first=first)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    usual = faults("")
    if usual < 5000:
        pytest.skip("the system's pages are too large here to tell by their number")
    assert faults("import sa_diffusers.cli") < usual / 3
    for name, said in {"MALLOC_TRIM_THRESHOLD_": "131072", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}.items():
        monkeypatch.setenv(name, said)  # what its user has said holds
        assert faults("import sa_diffusers.cli") > usual / 3
        monkeypatch.delenv(name)
