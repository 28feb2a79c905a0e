"""Gradient projection against flattened gradients in float64, through the real loop."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sa_diffusers.core.losses import DiffusionLoss, Loss
from sa_diffusers.core.objectives import (
    ElasticWeightConsolidation,
    GradientProjection,
    HeldAdversary,
    LowRankChange,
    LowRankEWC,
    SelectiveAmnesia,
)
from sa_diffusers.core.objectives.selective_amnesia import LOSSES
from sa_diffusers.core.seeding import seeded
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.loop import TrainingConfig, train


STEPS = 6
MODES = [(mode, conflict_only) for mode in ("symmetric", "alternating") for conflict_only in (False, True)]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, noisy, timesteps):
        return SimpleNamespace(sample=self.layers(noisy))


def objective_of(model: nn.Module, mode: str, conflict_only: bool) -> GradientProjection:
    loss = DiffusionLoss(torch.linspace(0.99, 0.5, 10, dtype=torch.float64))
    return GradientProjection(loss, list(model.parameters()), mode, conflict_only)


def batches(step: int) -> dict:
    """Odd pairs of steps ask for the negative of what replay asks for, so that the two gradients disagree there."""
    replay = 1 + torch.rand(4, 4, generator=seeded("replay", step), dtype=torch.float64)
    surrogate = replay.roll(1, 1) * (-1 if step // 2 % 2 else 1)
    return {"surrogate": {"sample": surrogate}, "replayed": {"sample": replay}, "step": torch.full((4,), step)}


def flat_gradients(model: nn.Module, objective: GradientProjection, drawn: dict) -> list[Tensor]:
    """g_f and g_r, each from a forward pass of its own."""
    gradients = []
    for name in ("surrogate", "replayed"):
        part = drawn[name]
        value = objective.loss(model, part["data"], part["terms"], part["noise"]).mean()
        parts = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in parts]))
    return gradients


def projected(g_f: Tensor, g_r: Tensor) -> tuple[Tensor, Tensor]:
    return g_f - (g_f @ g_r) / (g_r @ g_r) * g_r, g_r - (g_f @ g_r) / (g_f @ g_f) * g_f


def update(g_f: Tensor, g_r: Tensor, mode: str, conflict_only: bool, step: int) -> Tensor:
    """The definition, with vectors."""
    if not conflict_only or g_f @ g_r < 0:
        g_f, g_r = projected(g_f, g_r)
    return g_f + g_r if mode == "symmetric" else (g_r if step % 2 else g_f)


def settings(**options) -> TrainingConfig:
    return TrainingConfig(
        num_train_steps=STEPS, train_batch_size=4, learning_rate=1e-3, max_grad_norm=None, logging_steps=1, **options
    )


def gradient_of(model: nn.Module, objective: GradientProjection, drawn: dict) -> tuple[Tensor, dict]:
    loss, logs = objective(model, drawn)
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in parts]), logs


@pytest.mark.parametrize(("mode", "conflict_only"), MODES)
def test_the_loop_steps_along_the_projected_gradient(mode, conflict_only):
    model, oracle, seen, expected, conflicts = Denoiser(), Denoiser(), [], [], []
    objective = objective_of(model, mode, conflict_only)
    draw = objective.draw

    def remember(batch: dict, generator: torch.Generator) -> dict:
        drawn, step = draw(batch, generator), int(batch["step"][0])
        oracle.load_state_dict(model.state_dict())
        g_f, g_r = flat_gradients(oracle, objective, drawn)
        conflicts.append(bool(g_f @ g_r < 0))
        expected.append(update(g_f, g_r, mode, conflict_only, step))
        return drawn

    objective.draw = remember
    hook = register_optimizer_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.layers.parameters()]))
    )
    try:
        history = train(model, objective, batches, settings(), seed=3)
    finally:
        hook.remove()
    assert [row["grad_norm"] for row in history] == pytest.approx([e.norm().item() for e in expected])
    torch.testing.assert_close(seen, [e[2:] for e in expected])  # without the weights that are not used
    assert {(step % 2, conflict) for step, conflict in enumerate(conflicts)} == {
        (turn, conflict) for turn in (0, 1) for conflict in (False, True)
    }


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_what_is_left_of_each_gradient_is_orthogonal_to_the_other(step):
    model = Denoiser()
    objective = objective_of(model, "alternating", False)
    drawn = objective.draw(batches(step), seeded("objective", step))
    g_f, g_r = flat_gradients(model, objective, drawn)
    seen, logs = gradient_of(model, objective, drawn)
    own, other = (g_r, g_f) if step % 2 else (g_f, g_r)
    cosine = (own @ other) / (own.norm() * other.norm())
    assert abs(cosine) > 0.05  # else there would be nothing to remove
    assert abs(seen @ other) < 1e-12 * seen.norm() * other.norm()
    assert seen @ own > 0
    torch.testing.assert_close(logs["gradient_cosine"], cosine)


def test_the_log_holds_both_losses_as_they_are():
    model = Denoiser()
    objective = objective_of(model, "symmetric", False)
    drawn = objective.draw(batches(0), seeded("objective"))
    logs = objective(model, drawn)[1]
    for name, part in drawn.items():
        expected = objective.loss(model, part["data"], part["terms"], part["noise"]).mean().detach()
        torch.testing.assert_close(logs[LOSSES[name]], expected)
    assert set(logs) == {"surrogate_loss", "replay_loss", "gradient_cosine"}
    assert not any(value.requires_grad for value in logs.values())


class HalfIdle(Loss):
    """A loss whose gradient is 0 for samples of zeros."""

    num_terms = 1

    def sample_noise(self, batch: dict, generator: torch.Generator) -> Tensor:
        return torch.zeros(len(batch["sample"]))

    def __call__(self, model, batch, terms, noise) -> Tensor:
        return (batch["sample"] * model.weight).sum(1)


@pytest.mark.parametrize(("mode", "conflict_only"), MODES)
@pytest.mark.parametrize("idle", [("surrogate",), ("replayed",), ("surrogate", "replayed")])
@pytest.mark.parametrize("step", [0, 1])
def test_a_gradient_of_zero_leaves_the_other_alone(mode, conflict_only, idle, step):
    model = SimpleNamespace(weight=nn.Parameter(torch.ones(3)))
    objective = GradientProjection(HalfIdle(), [model.weight], mode, conflict_only)
    values = {"surrogate": torch.tensor([1.0, 2.0, 3.0]), "replayed": torch.tensor([3.0, -1.0, 0.5])}
    values |= dict.fromkeys(idle, torch.zeros(3))
    batch = {name: {"sample": value.repeat(2, 1)} for name, value in values.items()} | {"step": torch.full((2,), step)}
    loss, logs = objective(model, objective.draw(batch, torch.Generator()))
    (seen,) = torch.autograd.grad(loss, model.weight)
    turns = [values["replayed" if step else "surrogate"]] if mode == "alternating" else values.values()
    torch.testing.assert_close(seen, sum(turns))
    assert logs["gradient_cosine"].item() == 0


def test_a_resumed_run_knows_whose_turn_it_is(tmp_path):
    def run(folder=None, callback=None) -> nn.Module:
        model = Denoiser()
        objective = objective_of(model, "alternating", False)
        config = settings(checkpointing_steps=3)
        train(model, objective, batches, config, seed=3, checkpoint_dir=folder, callback=callback, callback_steps=1)
        return model

    def interrupt(step: int, row: dict) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupt)
    torch.testing.assert_close(run(tmp_path).state_dict(), run().state_dict(), rtol=0, atol=0)


def test_wrong_use_is_refused():
    model = Denoiser()
    with pytest.raises(ValueError, match="'symmetric' or 'alternating', got 'both'"):
        objective_of(model, "both", False)
    batch = {name: part for name, part in batches(0).items() if name != "step"}
    with pytest.raises(ValueError, match="expected 'step'"):
        objective_of(model, "alternating", False).draw(batch, torch.Generator())
    assert set(objective_of(model, "symmetric", False).draw(batch, torch.Generator())) == {"surrogate", "replayed"}


@pytest.mark.parametrize("option", [{"compile_backend": "inductor"}, {"mixed_precision": "fp16"}])
def test_what_two_gradients_of_one_pass_do_not_bear_is_refused(option):
    method = {"method": "projection-symmetric", "ewc_lambda": 0.0, "replay_target": "noise"}
    ForgetConfig(concept="0", **method)
    with pytest.raises(ValueError, match="no compile_backend, and not fp16"):
        ForgetConfig(concept="0", **method, **option)


class Taught:
    """A term that teaches the data of its part."""

    part = "adversary"

    def __init__(self, weight: float):
        self.weight = weight

    def draw(self, batch, generator):
        noise = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        return {"data": batch, "terms": torch.arange(4), "noise": noise, "distilled": torch.zeros(4).bool()}

    def __call__(self, model, frozen, batch):
        return batch


class Adapted(nn.Module):
    """A linear layer with a low-rank change."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4).double().requires_grad_(False)
        self.down, self.up = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((2, 4), (4, 2)))

    def forward(self, noisy, timesteps):
        return SimpleNamespace(sample=self.layer(noisy) + 0.5 * noisy @ (self.up @ self.down).T)


def holding(model: nn.Module, strength: float):
    """EWC of a model, which is moved from where it holds it, and its penalty written out."""
    if isinstance(model, Adapted):
        fisher = torch.rand(4, 4, generator=seeded("fisher"), dtype=torch.float64)
        ewc = LowRankEWC({"": LowRankChange(model.down, model.up, 0.5)}, {"": fisher}, strength, torch.float64)
        return ewc, lambda: strength * (fisher * (0.5 * model.up @ model.down) ** 2).sum()
    weights = dict(model.named_parameters())
    fisher = {name: torch.rand(weight.shape, generator=seeded(name)) for name, weight in weights.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    ewc = ElasticWeightConsolidation(weights, fisher, strength)
    with torch.no_grad():
        for name, weight in weights.items():
            weight += 0.1 * torch.randn(weight.shape, generator=seeded("moved", name), dtype=torch.float64)
    return ewc, lambda: strength * sum((fisher[n] * (weights[n] - before[n]) ** 2).sum() for n in weights)


def step_of(model: nn.Module, objective: SelectiveAmnesia, drawn: dict) -> tuple[Tensor, Tensor, dict]:
    """The gradient of a step over all weights, flattened; the loss and the logs."""
    model.zero_grad()
    loss, logs = objective(model, drawn)
    loss.backward()
    objective.add_gradient()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained]
    return torch.cat([part.flatten() for part in parts]), loss.detach(), logs


@pytest.mark.parametrize("sign", [-1, 1])  # of the weight, so that one of them is a conflict
@pytest.mark.parametrize("kind", [Denoiser, Adapted])
@pytest.mark.parametrize(("replay", "strength"), [(2.0, 5.0), (2.0, 0.0), (0.0, 5.0)])
def test_an_adversary_loses_what_points_against_replay_and_ewc(kind, replay, strength, sign):
    model, given = kind(), batches(0)
    ewc, penalty = holding(model, strength)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    arguments = DiffusionLoss(torch.linspace(0.99, 0.5, 10, dtype=torch.float64)), ewc if strength else None, replay
    plain, objective = (one(*arguments, terms=[Taught(3.0 * sign)]) for one in (SelectiveAmnesia, HeldAdversary))
    batch = {"surrogate": given["surrogate"], "replayed": given["replayed"]}
    drawn = plain.draw(batch | {"adversary": given["replayed"]}, seeded("draw"))

    def flat(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    def taught(part: dict) -> Tensor:
        return plain.loss(model, part["data"], part["terms"], part["noise"]).mean()

    surrogate, adversary = flat(taught(drawn["surrogate"])), flat(3 * sign * taught(drawn["adversary"]))
    holds = flat(penalty()) + (flat(replay * taught(drawn["replayed"])) if replay else 0)
    product = adversary @ holds
    left = adversary - product / (holds @ holds) * holds if product < 0 else adversary
    whole, loss, _ = step_of(model, plain, drawn)
    found, same, logs = step_of(model, objective, drawn)
    torch.testing.assert_close(found, surrogate + left + holds)
    torch.testing.assert_close(same, loss, rtol=0, atol=0)
    torch.testing.assert_close(logs["gradient_cosine"], product / (adversary.norm() * holds.norm()))
    assert torch.equal(found, whole) == bool(product >= 0)  # without a conflict nothing is changed, bit for bit
    del drawn["adversary"]  # a step without a search
    found, _, logs = step_of(model, objective, drawn)
    assert torch.equal(found, step_of(model, plain, drawn)[0]) and "gradient_cosine" not in logs
