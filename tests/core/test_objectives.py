"""What is minimised: EWC against autograd, Selective Amnesia against its terms taken apart, min-SNR weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import ElasticWeightConsolidation, Likelihood, NaiveForgetting, SelectiveAmnesia
from sa_diffusers.core.objectives import ewc as ewc_module
from sa_diffusers.core.objectives.selective_amnesia import LOSSES


T = 10
ALPHAS = torch.linspace(0.99, 0.05, T, dtype=torch.float64)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()
        self.norm = nn.LayerNorm(6).double()
        self.calls = 0

    def forward(self, noisy, timesteps, condition):
        self.calls += 1
        return SimpleNamespace(sample=self.norm(self.layer(noisy) + condition + timesteps[:, None] / T))


@pytest.fixture
def model() -> Denoiser:
    return Denoiser()


def data(size: int) -> dict:
    return {"sample": torch.randn(size, 6).double(), "condition": torch.randn(size, 6).double()}


def fisher_of(model: nn.Module) -> dict:
    return {name: torch.rand_like(p) for name, p in model.named_parameters()} | {"not trained": torch.ones(2)}


def moved_ewc(model: nn.Module, ewc_lambda: float, **options) -> ElasticWeightConsolidation:
    ewc = ElasticWeightConsolidation(dict(model.named_parameters()), fisher_of(model), ewc_lambda, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    return ewc


def test_ewc_gradient_equals_autograd_of_its_value(model):
    ewc = moved_ewc(model, 3.0)
    with torch.enable_grad():
        # `value` itself is computed without a graph, so the formula stands here once more.
        deltas = [p - a for p, a in zip(model.parameters(), ewc.anchor, strict=True)]
        value = 3.0 * sum((f * d.square()).sum() for f, d in zip(ewc.fisher, deltas, strict=True))
    torch.testing.assert_close(ewc.value(), value.detach())
    ewc.add_gradient()
    expected = torch.autograd.grad(value, list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_ewc_computes_in_groups_what_it_computes_at_once(model, monkeypatch):
    ewc = moved_ewc(model, 3.0)
    ewc.add_gradient()
    once, value = [p.grad.clone() for p in model.parameters()], ewc.value()
    model.zero_grad()
    monkeypatch.setattr(ewc_module, "GROUP_SIZE", 10)
    assert [group for group, _, _ in ewc._groups()] == [[0], [1, 2], [3]]  # of 36, 6, 6 and 6 weights
    ewc.add_gradient()
    assert_close([p.grad for p in model.parameters()], once)
    assert_close(ewc.value(), value)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_fisher_in_bfloat16_is_rounded_once(model, device):
    """The product is computed with the rounded values in the weights' own precision, and rounds nothing else."""
    torch.manual_seed(1)
    ewc = moved_ewc(model, 3.0, fisher_dtype=torch.bfloat16, device=device)
    torch.manual_seed(1)
    rounded = [f.to(torch.bfloat16).double() for f in list(fisher_of(model).values())[:-1]]
    assert {f.dtype for f in ewc.fisher} == {torch.bfloat16}
    deltas = [(p - a).detach() for p, a in zip(model.parameters(), ewc.anchor, strict=True)]
    ewc.add_gradient()
    expected = [6.0 * f * d for f, d in zip(rounded, deltas, strict=True)]
    assert_close([p.grad for p in model.parameters()], expected)
    assert_close(ewc.value(), sum(3.0 * (f * d.square()).sum() for f, d in zip(rounded, deltas, strict=True)))
    with pytest.raises(ValueError, match="expected fisher_dtype float32 or bfloat16, got torch.float16"):
        moved_ewc(model, 3.0, fisher_dtype=torch.float16)


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_anchor_is_kept_in_the_smallest_dtype_that_holds_it_exactly(model, kept):
    values = {torch.float16: 1 + 2**-10, torch.bfloat16: 2.0**100, torch.float32: 1 + 2**-20, torch.float64: 0.1}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model.norm.bias[0] = values[kept]
    ewc = ElasticWeightConsolidation(dict(model.named_parameters()), fisher_of(model), 1e6)
    assert [a.dtype for a in ewc.anchor] == [torch.float16] * 3 + [kept]
    assert ewc.value() == 0
    ewc.add_gradient()
    assert all(p.grad.eq(0).all() for p in model.parameters())
    with torch.no_grad():
        model.norm.bias[0] *= 2  # must leave the anchor alone
    assert ewc.value() > 0


def test_a_frozen_copy_of_the_weights_is_the_anchor_itself(model):
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    ewc = moved_ewc(model, 3.0, anchor=frozen)
    assert [a.data_ptr() for a in ewc.anchor] == [f.data_ptr() for f in frozen.values()]
    ewc.add_gradient()
    expected = [6.0 * f * (p - a) for f, p, a in zip(ewc.fisher, model.parameters(), frozen.values(), strict=True)]
    assert_close([p.grad for p in model.parameters()], [e.detach() for e in expected])
    with pytest.raises(ValueError, match="to be the weights before training, got others for layer.weight"):
        moved_ewc(model, 3.0, anchor=frozen)  # the weights have moved
    current = {name: p.detach().clone() for name, p in model.named_parameters() if name != "norm.weight"}
    with pytest.raises(ValueError, match="got none for norm.weight"):
        moved_ewc(model, 3.0, anchor=current)


def test_ewc_adds_to_the_gradient_that_is_there(model):
    ewc = moved_ewc(model, 3.0)
    ewc.add_gradient()
    once = [p.grad.clone() for p in model.parameters()]
    ewc.add_gradient()
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in once])


def test_ewc_is_exactly_zero_at_the_anchor(model):
    ewc = ElasticWeightConsolidation(dict(model.named_parameters()), fisher_of(model), 1e6)
    ewc.add_gradient()
    assert ewc.value().item() == 0
    assert all(p.grad.eq(0).all() for p in model.parameters())


def test_ewc_of_lambda_zero_leaves_no_gradient(model):
    moved_ewc(model, 0.0).add_gradient()
    assert all(p.grad is None for p in model.parameters())


def test_a_fisher_that_does_not_fit_is_refused(model):
    parameters, fisher = dict(model.named_parameters()), fisher_of(model)
    with pytest.raises(ValueError, match="1 of 4 trained parameters .* the first is layer.bias"):
        ElasticWeightConsolidation(parameters, {k: v for k, v in fisher.items() if k != "layer.bias"}, 1.0)
    with pytest.raises(ValueError, match="the first is norm.weight"):
        ElasticWeightConsolidation(parameters, fisher | {"norm.weight": torch.ones(6, 1)}, 1.0)
    with pytest.raises(ValueError, match="ewc_lambda >= 0, got -1"):
        ElasticWeightConsolidation(parameters, fisher, -1.0)


@pytest.mark.parametrize("replay_weight", [1.0, 0.25])
def test_selective_amnesia_is_the_sum_of_its_terms(model, replay_weight):
    loss = DiffusionLoss(ALPHAS)
    objective = SelectiveAmnesia(loss, None, replay_weight)
    batch = objective.draw({"surrogate": data(3), "replayed": data(5)}, torch.Generator().manual_seed(1))
    total, logs = objective(model, batch)
    assert model.calls == 1
    parts = {
        name: loss(model, part["data"], part["terms"], part["noise"]).mean().detach() for name, part in batch.items()
    }
    torch.testing.assert_close(total.detach(), parts["surrogate"] + replay_weight * parts["replayed"])
    torch.testing.assert_close(logs, {"surrogate_loss": parts["surrogate"], "replay_loss": parts["replayed"]})


def test_surrogate_and_replay_have_timesteps_of_their_own():
    objective = SelectiveAmnesia(DiffusionLoss(ALPHAS), None)
    batch = objective.draw({"surrogate": data(64), "replayed": data(64)}, torch.Generator().manual_seed(1))
    terms = [part["terms"] for part in batch.values()]
    assert all(set(part.tolist()) == set(range(T)) for part in terms)
    assert not terms[0].equal(terms[1])


def test_no_replay_weight_leaves_replay_out_of_the_pass(model):
    objective = SelectiveAmnesia(DiffusionLoss(ALPHAS), None, replay_weight=0)
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    batch = objective.draw({"surrogate": data(3), "replayed": data(5)}, torch.Generator().manual_seed(1))
    total, logs = objective(model, batch)
    assert sizes == [3]
    torch.testing.assert_close(logs, {"surrogate_loss": total.detach()})
    with pytest.raises(ValueError, match="replay_weight >= 0, got -1"):
        SelectiveAmnesia(DiffusionLoss(ALPHAS), None, replay_weight=-1)


def test_selective_amnesia_hands_ewc_on(model):
    ewc = moved_ewc(model, 2.0)
    objective = SelectiveAmnesia(DiffusionLoss(ALPHAS), ewc)
    objective.add_gradient()
    expected = [4.0 * f * (p.detach() - a) for p, f, a in zip(model.parameters(), ewc.fisher, ewc.anchor, strict=True)]
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    torch.testing.assert_close(objective.regularisation(), {"ewc_penalty": ewc.value()})
    assert SelectiveAmnesia(DiffusionLoss(ALPHAS), None).regularisation() == {}


@pytest.mark.parametrize("replay_weight", [1.0, 0.25, 0.0])
def test_naive_forgetting_climbs_where_selective_amnesia_descends(model, replay_weight):
    loss, ewc = DiffusionLoss(ALPHAS), moved_ewc(model, 2.0)
    objective = NaiveForgetting(loss, ewc, replay_weight)
    batch = objective.draw({"surrogate": data(3), "replayed": data(5)}, torch.Generator().manual_seed(1))
    total, logs = objective(model, batch)
    means = {n: loss(model, part["data"], part["terms"], part["noise"]).mean() for n, part in batch.items()}
    parameters = list(model.parameters())
    parts = {name: torch.autograd.grad(value, parameters) for name, value in means.items()}
    replay = parts.get("replayed", [torch.zeros_like(p) for p in parameters])
    expected = [replay_weight * g - surrogate for surrogate, g in zip(parts["surrogate"], replay, strict=True)]
    torch.testing.assert_close(list(torch.autograd.grad(total, parameters)), expected)
    torch.testing.assert_close(logs, {LOSSES[name]: value.detach() for name, value in means.items()})
    objective.add_gradient()  # EWC keeps its sign
    pull = [4.0 * f * (p.detach() - a) for p, f, a in zip(parameters, ewc.fisher, ewc.anchor, strict=True)]
    torch.testing.assert_close([p.grad for p in parameters], pull)


@pytest.mark.parametrize(
    ("prediction_type", "weight"),
    [
        ("epsilon", lambda snr: min(snr, 5.0) / snr),  # Hang et al. 2023, Eq. 7
        ("v_prediction", lambda snr: min(snr, 5.0) / (snr + 1)),
    ],
)
def test_min_snr_weights(model, prediction_type, weight):
    loss = DiffusionLoss(ALPHAS, prediction_type)
    objective = Likelihood(loss, snr_gamma=5.0)
    batch = objective.draw(data(T), torch.Generator().manual_seed(1)) | {"terms": torch.arange(T)}
    values = loss(model, batch["data"], batch["terms"], batch["noise"]).tolist()
    expected = [weight(a / (1 - a)) * value for a, value in zip(ALPHAS.tolist(), values, strict=True)]
    torch.testing.assert_close(objective(model, batch)[0].item(), sum(expected) / T)
    unweighted = Likelihood(loss)(model, batch)[0]
    torch.testing.assert_close(unweighted.item(), sum(values) / T)


def test_distilled_replay_is_compared_with_the_frozen_model(model):
    """Marked rows take the frozen model's prediction as their target; the others the noise that was drawn."""
    loss, frozen = DiffusionLoss(ALPHAS), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    marked = torch.tensor([True, False, True, False])
    objective = SelectiveAmnesia(loss, None, replay_weight=2.0, frozen=frozen)
    batch = {"surrogate": data(4), "replayed": data(4) | {"distilled": marked}}
    drawn = objective.draw(batch, torch.Generator().manual_seed(1))
    total, logs = objective(model, drawn)

    expected, replay = [], drawn["replayed"]
    for index in range(4):
        row = {key: value[index : index + 1] for key, value in replay["data"].items()}
        term, noise = replay["terms"][index : index + 1], replay["noise"][index : index + 1]
        target = loss.predict(frozen, row, term, noise) if marked[index] else noise
        expected.append((loss.predict(model, row, term, noise) - target).square().mean())
    assert_close(logs["replay_loss"], torch.stack(expected).mean().detach())
    assert_close(total.detach(), logs["surrogate_loss"] + 2 * logs["replay_loss"])
    assert not logs["replay_loss"].isclose(SelectiveAmnesia(loss, None)(model, drawn)[1]["replay_loss"])


def test_distilled_replay_says_nothing_as_long_as_nothing_has_changed(model):
    objective = SelectiveAmnesia(DiffusionLoss(ALPHAS), None, frozen=copy.deepcopy(model))
    batch = {"surrogate": data(3), "replayed": data(3) | {"distilled": torch.ones(3, dtype=torch.bool)}}
    _, logs = objective(model, objective.draw(batch, torch.Generator()))
    assert logs["replay_loss"] < 1e-20  # but for rounding: the frozen model sees another batch
    assert logs["surrogate_loss"] > 0


def test_a_distilled_surrogate_is_compared_with_the_frozen_model_under_other_conditions(model):
    """What the frozen model makes of the same noisy sample under the conditions in "frozen" is the target."""
    loss, frozen = DiffusionLoss(ALPHAS), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    surrogate, conditions = data(4), {key: value for key, value in data(4).items() if key != "sample"}
    marked = {"distilled": torch.ones(4, dtype=torch.bool), "frozen": conditions}
    objective = SelectiveAmnesia(loss, None, frozen=frozen)
    drawn = objective.draw({"surrogate": surrogate | marked, "replayed": data(4)}, torch.Generator().manual_seed(1))
    _, logs = objective(model, drawn)
    expected, part = [], drawn["surrogate"]
    for index in range(4):
        row = {key: value[index : index + 1] for key, value in surrogate.items()}
        other = {"sample": row["sample"]} | {key: value[index : index + 1] for key, value in conditions.items()}
        term, noise = part["terms"][index : index + 1], part["noise"][index : index + 1]
        difference = loss.predict(model, row, term, noise) - loss.predict(frozen, other, term, noise)
        expected.append(difference.square().mean())
    assert_close(logs["surrogate_loss"], torch.stack(expected).mean().detach())
    assert_close(logs["replay_loss"], SelectiveAmnesia(loss, None)(model, drawn)[1]["replay_loss"])  # not marked
