"""What every registered method promises, run on a tiny pipeline: its needs, its options, its files, resuming."""

import json

import pytest
import yaml
from cheap_runs import CHEAP
from torch.testing import assert_close

from sa_diffusers import methods
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.core.concepts import Concept, Concepts
from sa_diffusers.families import family_class
from sa_diffusers.families.base import select_parameters
from sa_diffusers.families.scopes import SCOPES
from sa_diffusers.io.configuration import config_to_yaml, layered
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs.options import ForgetConfig


FILES = {
    "samples": "samples/samples.safetensors",
    "surrogate": "surrogate/surrogate.safetensors",
    "fisher": "fisher.safetensors",
    "edit": "edit.safetensors",
}
# What the history of its training tells apart; of others it is the loss alone.
TERMS = {
    "finetune": {"surrogate_loss"},
    "ewc": {"surrogate_loss", "ewc_penalty"},
    "replay": {"surrogate_loss", "replay_loss"},
    "sa": {"surrogate_loss", "replay_loss", "ewc_penalty"},
    "sa+esd": {"surrogate_loss", "replay_loss", "ewc_penalty", "esd_loss"},
} | dict.fromkeys(("esd-x", "esd-x-strict", "esd-u", "uce"), set())
METHODS = methods.registry()
# Fast: the default. Objectives of the others have tests of their own, and what does not train has runs of its own.
CASES = [
    pytest.param(name, marks=() if name == methods.DEFAULT else pytest.mark.slow)
    for name, method in METHODS.items()
    if not method.completes  # those are run in test_encoder.py
]


@pytest.mark.parametrize("name", CASES)
def test_needs_options_files_and_resuming(name, run_cheaply, tiny_pipeline, tmp_path):
    method = METHODS[name]
    outcome = run_cheaply(tmp_path, method=name)

    # What it settles stands in the run's options, and what was given is left as it was.
    options = yaml.safe_load((tmp_path / "config.yaml").read_text())
    settled = {option: value for option, value in CHEAP.items() if option not in method.fixes} | method.fixes
    assert {option: options[option] for option in settled} == settled

    # Its needs are the files that appear, and those that these need.
    needs = method.needs(ForgetConfig(**options), Concepts([Concept(("seven", "7"), "nine")]))
    assert needs <= set(methods.base.NEEDS)
    needs |= {"samples"} if needs & {"replay_samples", "fisher"} else set()
    for need, file in FILES.items():
        assert (tmp_path / file).exists() == (need in needs), (need, file)
    worked, told = set(outcome.metrics["amounts"]), {"surrogate", "fisher"}
    assert worked & told == needs & told

    # It trains its scope, most of it, by its terms, and its card names it.
    before, after = tiny_pipeline().unet, outcome.pipeline.unet
    changed = {name for name, p in after.named_parameters() if not p.equal(before.get_parameter(name))}
    inside = set(select_parameters(before, options["train_scope"], SCOPES))
    assert changed <= inside and (not method.trains or len(changed) > 0.5 * len(inside))
    if name in TERMS:
        history = json.loads((tmp_path / "history.json").read_text())
        assert {key for row in history for key in row} - {"step", "loss", "grad_norm", "learning_rate"} == TERMS[name]
    assert method.title in (tmp_path / "pipeline" / "README.md").read_text()

    # The saved pipeline is whole, of a class that its family adapts, and has the returned one's weights.
    loaded = load_pipeline(str(tmp_path / "pipeline"), None, None, "float32")
    kind = type(outcome.pipeline).__name__
    assert type(loaded).__name__ == kind and family_class(kind) is not None
    assert_close(dict(loaded.unet.state_dict()), dict(outcome.pipeline.unet.state_dict()), rtol=0, atol=0)

    # The same command again computes nothing.
    again = run_cheaply(tmp_path, method=name)
    assert set(again.metrics["seconds"]["reused"]) >= {"train", "after", "before"}
    assert again.metrics["after"] == outcome.metrics["after"]
    assert_close(dict(again.pipeline.unet.state_dict()), dict(outcome.pipeline.unet.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_contradicting_value_is_refused_and_an_earlier_layers_dropped(name):
    for option, value in METHODS[name].fixes.items():
        other = {"surrogate_target": "model", "start": "edit", "replay_target": "model", "train_scope": "encoder"}
        wrong = other.get(option, 7.0)
        with pytest.raises(ValueError, match=f"works with {option} .* alone, got {wrong}; omit it"):
            ForgetConfig(method=name, **{option: wrong})
        merged = layered(ForgetConfig, {option: wrong}, {"method": name})
        assert getattr(ForgetConfig(**merged).resolved(), option) == value


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.takes_lora])
def test_adapters_are_refused_where_they_are_not_trained(name):
    with pytest.raises(ValueError, match=f"lora_rank: adapters are not trained by {name.replace('+', '.')}"):
        ForgetConfig(method=name, lora_rank=4)


def test_what_a_method_settled_does_not_outlive_it(tmp_path):
    """config.yaml of a run says what its method settled; with another method on the command line that is gone."""
    path = tmp_path / "config.yaml"
    config_to_yaml(ForgetConfig(method="esd-x", concept="seven").resolved(), path)
    again = parse_config(ForgetConfig, ["--config", str(path), "--method", methods.DEFAULT]).resolved()
    assert (again.ewc_lambda, again.replay_weight, again.train_scope) == (50.0, 1.0, "full")
    kept = parse_config(ForgetConfig, ["--config", str(path)]).resolved()
    assert (kept.method, kept.ewc_lambda, kept.train_scope) == ("esd-x", 0.0, "xattn")
    family = {"ewc_lambda": 0.001}  # said before any method was chosen, so for any that has EWC
    for between, weight in (({"method": "finetune", "ewc_lambda": 0.0}, 0.001), ({"ewc_lambda": 3.0}, 3.0)):
        assert layered(ForgetConfig, family, between, {"method": methods.DEFAULT})["ewc_lambda"] == weight
