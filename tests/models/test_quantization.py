"""Layers of few bits under a LoRA: what they stand for is kept, changed and saved whole; the Fisher is of it."""

from importlib.util import find_spec

import pytest
import torch
from cheap_runs import CHEAP, PROMPTS
from tiny_text_to_image import make
from torch import nn
from torch.testing import assert_close

from sa_diffusers.core.fisher_file import Fisher
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.families import get_family
from sa_diffusers.io.loading import load_pipeline, model_hash
from sa_diffusers.models.quantization import ORIGINAL, gradients_of, original_state, quantized, unquantized
from sa_diffusers.runs.forget import forget
from sa_diffusers.runs.options import ForgetConfig


LORA = {"lora_rank": 2, "lora_targets": "attention+conditioning", "fisher_layers": "trained", "learning_rate": 0.01}
installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra 8bit is not installed")


class Rounded(nn.Linear):
    """A linear layer whose weight takes no gradient and has another shape, as one of 4 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__(*linear.weight.shape[::-1])
        self.bias = linear.bias
        self.weight = nn.Parameter(linear.weight.detach().view(torch.int32).view(-1, 1), requires_grad=False)
        setattr(self, ORIGINAL, (linear,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.view(torch.float32).view(self.out_features, -1), self.bias)


def test_pictures_of_few_bits_are_not_beside_those_of_the_whole_weights():
    found = Findings({}, {}, torch.empty(0, 3, 8, 8), [], {}, {"model": "a"})
    assert found.misfit({"model": "a", "bits": "4"}, []) == "was drawn with other bits"


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3), nn.LayerNorm(3)).eval()


def test_gradients_of_weights_that_take_none(model):
    x, target, names = torch.randn(2, 5, 6), torch.randn(2, 5, 3), ["0.weight", "0.bias", "2.weight", "3.weight"]

    def gradients(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        model.requires_grad_(False)
        with gradients_of(model, names, dtype) as parameters:
            assert list(parameters) == names
            return torch.autograd.grad((model(x) - target).square().sum(), list(parameters.values()))

    expected, whole = gradients(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0], model[2] = Rounded(model[0]), Rounded(model[2])
    assert_close(gradients(), expected)
    assert not model[0]._forward_hooks
    assert original_state(model).keys() == whole.keys() != model.state_dict().items()
    assert_close(original_state(model), whole, rtol=0, atol=0)


@installed
@pytest.mark.parametrize("bits", [8, 4])
def test_a_module_is_whole_again_with_what_was_changed(model, bits):
    x, hashed = torch.randn(7, 6), model_hash(model)
    expected, whole = model(x), [layer.weight.detach().clone() for layer in (model[0], model[2])]
    with quantized(model, bits):
        assert type(model[0]) is not nn.Linear and not model[0].weight.is_floating_point()
        assert_close(model(x), expected, rtol=0.2, atol=0.5)
        assert not model(x).equal(expected) and model_hash(model) == hashed
        with unquantized(model, bits):
            assert_close(model(x), expected, rtol=0, atol=0)
            model[0].weight.data.mul_(2)
        assert type(model[0]) is not nn.Linear
    assert [type(layer) for layer in model] == [nn.Linear, nn.SiLU, nn.Linear, nn.LayerNorm]
    assert_close(model[0].weight, 2 * whole[0], rtol=0, atol=0)
    assert_close(model[2].weight, whole[1], rtol=0, atol=0)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_over_few_bits_saves_the_whole_weights_and_the_change(bits, tiny_tokenizer, few_pictures, tmp_path):
    pipeline = make("sd3", tiny_tokenizer)
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    (tmp_path / "replay.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "templates.txt").write_text("a {}\na red {}")
    options = CHEAP | LORA | {"ewc_lambda": 1.0, "replay_prompts": str(tmp_path / "replay.txt")}
    options |= {"concept_templates": str(tmp_path / "templates.txt"), "quantize_base": bits}
    forgotten = forget(pipeline, "seven", "nine", output_dir=tmp_path / "run", **options)
    fisher = Fisher.load(tmp_path / "run" / "fisher.safetensors")
    layers = get_family(pipeline).adapted_layers("full", "attention+conditioning")
    assert {name: tensor.shape for name, tensor in fisher.tensors.items()} == {
        f"{name}.weight": before[f"{name}.weight"].shape for name in layers
    }
    assert fisher.metadata["model_hash"] == model_hash(pipeline.transformer)
    saved = load_pipeline(str(tmp_path / "run" / "pipeline"), None, None, "float32").transformer.state_dict()
    changed = {name for name, tensor in saved.items() if not tensor.equal(before[name])}
    assert changed and changed <= set(fisher.tensors)
    assert_close(forgotten.transformer.state_dict(), saved, rtol=0, atol=0)
    again = forget(pipeline, "seven", "nine", output_dir=tmp_path / "run", **options)  # every stage from its files
    assert_close(again.transformer.state_dict(), saved, rtol=0, atol=0)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert_close(pipeline.transformer.state_dict(), saved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_base": 5}, "expected 8 or 4 bits, got 5"),
        ({"quantize_base": 4}, "pass a lora_rank" if find_spec("bitsandbytes") else "needs bitsandbytes"),
        pytest.param(LORA | {"quantize_base": 4, "fisher_layers": "all"}, "fisher_layers trained", marks=installed),
        pytest.param(LORA | {"quantize_base": 8, "snapshot_steps": [5]}, "other strengths", marks=installed),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ForgetConfig(concept="seven", surrogate="nine", **options)
