"""Adapters that stand by themselves: a concept each in one run, taken back, merged."""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers import unforget
from sa_diffusers.__main__ import main
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.runs.adapters.chains import merge
from sa_diffusers.runs.chain import chain_of, taken_over
from sa_diffusers.runs.options import ForgetConfig


pytestmark = [pytest.mark.usefixtures("few_pictures"), pytest.mark.slow]  # several runs a test
PAIRS = {"concept": "seven, 7; eight", "surrogate": "nine; six"}
OWN = {"lora_rank": 2, "lora_alpha": 3.0, "start": "edit", "uce_preserve_scale": 0.1, "surrogate_target": "model"}


@pytest.fixture(scope="module")
def each(run_cheaply, tmp_path_factory):
    """The folder of a run with an adapter for "seven" and one for "eight"."""
    return run_cheaply(tmp_path_factory.mktemp("each") / "run", **PAIRS, **OWN, adapters="each").output_dir


def weights(pipeline_or_folder, kind=None):
    pipeline = kind.from_pretrained(pipeline_or_folder) if kind else pipeline_or_folder
    return {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}


def with_adapters(pipeline, folder, *names):
    for name in names:
        pipeline.load_lora_weights(folder / "lora", weight_name=f"{name}.safetensors", adapter_name=name)
    pipeline.set_adapters(list(names))
    pipeline.fuse_lora(adapter_names=list(names))
    pipeline.unload_lora_weights()
    return weights(pipeline)


def test_stock_diffusers_takes_any_of_the_adapters(each, tiny_pipeline):
    pipeline, both = tiny_pipeline(), with_adapters(tiny_pipeline(), each, "seven", "eight")
    assert_close(weights(each / "pipeline", type(pipeline)), both, rtol=1e-5, atol=1e-6)
    base, alone = weights(pipeline), [with_adapters(tiny_pipeline(), each, name) for name in ("seven", "eight")]
    summed = {name: alone[0][name] + alone[1][name] - base[name] for name in base}
    assert_close(both, summed, rtol=1e-5, atol=1e-5)
    changed = [name for name in base if not torch.equal(alone[0][name], base[name])]
    assert changed and any(not torch.allclose(alone[0][name], alone[1][name]) for name in changed)
    card = (each / "lora" / "README.md").read_text()
    assert 'weight_name="eight.safetensors"' in card and 'set_adapters(["eight", "seven"])' in card


def test_each_is_trained_as_if_there_were_no_other(each, run_cheaply, tmp_path):
    """A run that was stopped after the first trains the second alone, to the same file."""
    again = tmp_path / "run"
    shutil.copytree(each, again)
    (again / ".stages" / "train.json").unlink()
    shutil.rmtree(again / "lora")
    (again / "checkpoints" / "eight" / "history.json").unlink()
    run_cheaply(again, **PAIRS, **OWN, adapters="each")
    for name in ("seven", "eight"):
        assert (again / "lora" / f"{name}.safetensors").read_bytes() == (
            each / "lora" / f"{name}.safetensors"
        ).read_bytes()
    history = json.loads((each / "history.json").read_text())
    assert [line["step"] for line in history] == [*range(1, 9)]


def test_a_concept_is_taken_back(each, tiny_pipeline, tmp_path):
    main(["unforget", str(each), "--concept", "7", "--output_dir", str(tmp_path / "back")])
    eight = with_adapters(tiny_pipeline(), each, "eight")
    kind = type(tiny_pipeline())
    assert_close(weights(tmp_path / "back" / "pipeline", kind), eight, rtol=1e-5, atol=1e-6)
    assert [record["concept"] for record in read_forgotten(str(tmp_path / "back" / "pipeline"))] == ["eight"]
    metrics = json.loads((tmp_path / "back" / "metrics.json").read_text())
    assert (metrics["concept"], metrics["taken_back"]) == ("eight", "seven")
    # What is left can be gone on from, or taken back in turn, but for the last of it.
    (link,) = chain_of(str(tmp_path / "back"))
    assert list(link.adapters.values()) == [["eight"]]
    given = {"concept": "seven", "surrogate": "nine", "after": str(link.folder), "model": link.options["model"]}
    goes_on = taken_over(ForgetConfig(**given).resolved())
    assert (goes_on.samples, goes_on.fisher) == (str(each / "samples"), str(each / "fisher.safetensors"))
    with pytest.raises(ValueError, match="'eight' is all that .* has forgotten: use its original"):
        unforget(tmp_path / "back", "eight", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_adapters_are_merged_by_their_sum_or_by_ties(each, tiny_pipeline, tmp_path):
    summed = merge(each, tmp_path / "sum", ["eight", "7"])
    assert_close(
        weights(summed.pipeline), with_adapters(tiny_pipeline(), each, "seven", "eight"), rtol=1e-5, atol=1e-6
    )
    merged, base = weights(merge(each, tmp_path / "ties", density=0.5).pipeline), weights(tiny_pipeline())
    alone = [with_adapters(tiny_pipeline(), each, name) for name in ("seven", "eight")]
    for name, weight in base.items():
        first, second = (_largest(one[name] - weight, 0.5) for one in alone)
        # TIES of two: where signs agree their mean, else the larger; what is not kept does not count.
        agree = (first * second) >= 0
        number = ((first != 0).int() + (second != 0).int()).clamp(min=1)
        larger = torch.where(first.abs() >= second.abs(), first, second)
        expected = torch.where(agree, (first + second) / number, larger)
        assert_close(merged[name] - weight, expected, rtol=1e-3, atol=1e-5)


def _largest(change, share):
    kept = torch.zeros_like(change).flatten()
    rows = change.flatten().abs().topk(int(share * change.numel())).indices
    kept[rows] = change.flatten()[rows]
    return kept.view_as(change)


def test_what_cannot_be_taken_apart_is_refused(each, run_cheaply, tmp_path):
    with pytest.raises(ValueError, match="has forgotten seven, eight; expected one of these, got 'two'"):
        unforget(each, "two", tmp_path / "new")
    with pytest.raises(ValueError, match="expected a density above 0 and at most 1, got 0"):
        merge(each, tmp_path / "new", density=0.0)
    for changes, says in (
        ({"lora_rank": None, "lora_alpha": None}, "expected a lora_rank"),
        ({"strength_sheet": True}, "no one adapter for strength_sheet"),
    ):
        with pytest.raises(ValueError, match=says):
            run_cheaply(tmp_path / "new", **PAIRS, **OWN | changes, adapters="each")
    together = run_cheaply(tmp_path / "together", **PAIRS, **OWN)
    with pytest.raises(ValueError, match="seven, eight share one adapter: expected all of them or none"):
        unforget(together.output_dir, "seven", tmp_path / "new")
    assert not (tmp_path / "new").exists()
