"""The Fisher of linear layers: a batch at a time against one sample at a time, and against a loop in float64."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import FisherSums, estimate_fisher, merge
from sa_diffusers.core.fisher_linear import estimate_linear_fisher, is_linear
from sa_diffusers.core.losses import DiffusionLoss, VAELoss
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import get_family
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.fisher import estimate_sums
from scripts import benchmark


COUNT = 11
LOSS = VAELoss(3)
IMAGES = torch.rand(COUNT, 1, 5, 5, generator=seeded("images"), dtype=torch.float64)
LABELS = torch.arange(COUNT) % 4


@pytest.fixture
def model() -> ConditionalVAE:
    torch.manual_seed(1)
    return ConditionalVAE(image_size=5, num_classes=4, hidden_sizes=(8, 6), latent_dim=3).double().eval()


def sample(indices: list[int]) -> dict:
    return {"sample": IMAGES[indices], "labels": LABELS[indices]}


def run(model, indices=range(COUNT), **options) -> FisherSums:
    return estimate_linear_fisher(model, LOSS, sample, indices, **options)


def one_by_one(model, indices=range(COUNT), **options) -> FisherSums:
    parameters = dict(model.named_parameters())
    return estimate_fisher(model, LOSS, parameters, lambda i: sample([i]), indices, terms=None, **options)


def assert_equal(first: FisherSums, second: FisherSums, rtol=1e-6) -> None:
    """The squares are kept in float32, everything else in float64."""
    for name, expected in second.square.items():
        torch.testing.assert_close(first.square[name], expected, rtol=rtol, atol=rtol * expected.max().item())
    torch.testing.assert_close(first.totals, second.totals, rtol=1e-9, atol=0)
    torch.testing.assert_close(first.unbiased, second.unbiased, rtol=1e-9, atol=0)
    assert first.ratio == second.ratio == 1.0


@pytest.mark.parametrize("batch_size", [1, 4, COUNT, 512])
@pytest.mark.parametrize("seed", [0, 5])
def test_equals_one_sample_at_a_time_whatever_the_batch(model, batch_size, seed):
    assert_equal(run(model, batch_size=batch_size, seed=seed), one_by_one(model, seed=seed))


def test_float32_equals_a_loop_over_samples_in_float64(model):
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index in range(COUNT):
        generator = seeded(0, "fisher", index, 0)
        torch.rand(1, generator=generator, dtype=torch.float64)
        noise = torch.randn(1, 3, generator=generator, dtype=torch.float32).double()
        values = LOSS(model, sample([index]), torch.zeros(1, dtype=torch.long), noise)
        for total, gradient in zip(
            expected.values(), torch.autograd.grad(values.sum(), list(model.parameters())), strict=True
        ):
            total += gradient.square()

    def single(indices: list[int]) -> dict:
        return {"sample": IMAGES[indices].float(), "labels": LABELS[indices]}

    sums = estimate_linear_fisher(model.float(), LOSS, single, range(COUNT), batch_size=3)
    for name, square in expected.items():
        torch.testing.assert_close(sums.square[name].double(), square, rtol=1e-4, atol=1e-9 * square.max().item())
        torch.testing.assert_close(sums.totals[name], (square.sum().item(),) * 2, rtol=1e-5, atol=0)


def test_halves_merge_and_resume_to_the_whole(model):
    whole = run(model, batch_size=4)
    merged = merge([run(model, range(0, COUNT, 2), batch_size=4), run(model, range(1, COUNT, 2))])
    assert_equal(merged, whole)
    resumed = run(model, range(5, COUNT), sums=run(model, range(5)))
    assert_equal(resumed, whole)
    assert list(resumed.unbiased) == list(range(COUNT))


class Layers(nn.Module):
    """Whatever is done with two layers, as the model of a loss that sums its output."""

    def __init__(self, forward, bias=True, **modules):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=bias), nn.Linear(3, 3)
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, sample, noise):
        return SimpleNamespace(logits=self.run(self, sample), mean=noise, log_variance=noise)


def rows(indices: list[int]) -> dict:
    return {"sample": torch.rand(COUNT, 3, generator=seeded("rows"))[indices]}


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, x: model.second(model.first(x).relu_()),  # changes the output of a layer in place
        lambda model, x: model.first(x) * model.second(x),
        lambda model, x: model.first(x),  # a layer that is not called
        lambda model, x: model.first(x) + 0 * model.second(x).detach(),  # or that the loss does not depend on
    ],
)
def test_other_ways_of_using_layers(forward):
    model = Layers(forward, bias=False).double()
    parameters = dict(model.named_parameters())

    def double(indices: list[int]) -> dict:
        return {"sample": rows(indices)["sample"].double()}

    sums = estimate_linear_fisher(model, LOSS, double, range(COUNT), batch_size=4)
    assert_equal(sums, estimate_fisher(model, LOSS, parameters, lambda i: double([i]), range(COUNT), terms=None))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda model, x: model.first(model.first(x)), "first is called again"),
        (lambda model, x: model.first(x[:, None])[:, 0], r"first is given \[4, 1, 3\]"),
        (lambda model, x: model.first(x.repeat(2, 1))[:4], r"first is given \[8, 3\]"),
        (lambda model, x: 1 / 0, "division by zero"),
    ],
)
def test_hooks_are_removed_whatever_happens(forward, message):
    model = Layers(forward)
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        estimate_linear_fisher(model, LOSS, rows, range(4))
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_and_nothing_else_is_left(model):
    run(model)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def test_where_it_applies(model):
    def tied() -> Layers:
        model = Layers(lambda model, x: x)
        model.second.weight = model.first.weight
        return model

    others = {
        "a convolution": Layers(lambda model, x: x, other=nn.Conv2d(1, 1, 3)),
        "a norm": Layers(lambda model, x: x, other=nn.LayerNorm(3)),
        "another kind of linear layer": Layers(lambda model, x: x, other=Scaled(3, 3)),
        "one weight in two layers": tied(),
    }
    assert is_linear(model, LOSS)
    assert is_linear(Layers(lambda model, x: x, other=nn.ReLU()), LOSS)
    assert not is_linear(model, DiffusionLoss(torch.linspace(0.9, 0.1, 7)))
    for name, other in others.items():
        assert not is_linear(other, LOSS), name
        with pytest.raises(ValueError, match="use estimate_fisher"):
            estimate_linear_fisher(other, LOSS, rows, range(4))


def test_a_gradient_that_is_not_finite_names_the_sample(model):
    def broken(indices: list[int]) -> dict:
        batch = sample(indices)
        return batch | {"sample": torch.where(torch.tensor(indices).view(-1, 1, 1, 1) == 6, math.nan, batch["sample"])}

    sums = FisherSums.zeros(dict(model.named_parameters()))
    with pytest.raises(FloatingPointError, match="sample 6 is not finite"):
        estimate_linear_fisher(model, LOSS, broken, range(COUNT), batch_size=4, sums=sums)
    assert_equal(sums, run(model, range(4)))


@pytest.mark.parametrize("fisher_terms", ["all", "10"])
@pytest.mark.parametrize("linear", [True, False])
def test_a_run_saves_and_resumes_and_takes_the_one_term_whatever_is_asked_for(
    model, tmp_path, monkeypatch, fisher_terms, linear
):
    """The one-by-one path is what a model of convolutions with such a loss takes."""
    if not linear:
        monkeypatch.setattr("sa_diffusers.runs.stages.fisher.is_linear", lambda model, loss: False)
    config = ForgetConfig(concept="1", fisher_terms=fisher_terms, seed=2)
    family = get_family(ConditionalVAEPipeline(model))
    samples = SampleSet(IMAGES, [Condition(label=label) for label in LABELS.tolist()])
    calls = []
    batch = family.batch
    family.batch = lambda latents, conditions: calls.append(len(conditions)) or batch(latents, conditions)
    sums = estimate_sums(family, config, samples, COUNT, tmp_path)
    assert calls == ([2] * 5 + [1] if linear else [1] * COUNT)
    assert_equal(sums, one_by_one(model, seed=derive_seed(2, "fisher")))
    estimate_sums(family, config, samples, COUNT, tmp_path)
    assert sum(calls) == COUNT  # nothing twice


def test_benchmark(tmp_path, monkeypatch, capsys):
    options = ["--only", "fisher_linear", "--linear_samples", "6", "--one_by_one_samples", "2"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *options, "--output_dir", str(tmp_path)])
    benchmark.main()
    slow, fast = json.loads((tmp_path / "benchmark.json").read_text())
    assert (slow["samples"], fast["samples"]) == (2, 6)
    assert fast["times_faster"] == pytest.approx(slow["seconds_per_sample"] / fast["seconds_per_sample"])
    assert 0 < fast["largest_difference"] < 1e-5
    assert (tmp_path / "benchmark.md").read_text() in capsys.readouterr().out
