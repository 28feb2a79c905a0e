"""The only optimisation loop: resumed, accumulated or shared by processes, it gives the same weights."""

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import ElasticWeightConsolidation, SelectiveAmnesia
from sa_diffusers.core.seeding import seeded
from sa_diffusers.training import options as training_config
from sa_diffusers.training.loop import TrainingConfig, TrainingDiverged, train
from sa_diffusers.training.optimisation import Optimisation


STEPS = 6


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, noisy, timesteps):
        return SimpleNamespace(sample=self.layers(noisy) * self.frozen + timesteps[:, None] / 10)


def batches(step: int) -> dict:
    return {name: {"sample": torch.randn(4, 4, generator=seeded(name, step))} for name in ("surrogate", "replayed")}


def selective_amnesia(model: nn.Module, ewc_lambda: float = 2.0) -> SelectiveAmnesia:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fisher = {name: torch.rand(p.shape, generator=seeded(name)) for name, p in trained.items()}
    ewc = ElasticWeightConsolidation(trained, fisher, ewc_lambda)
    return SelectiveAmnesia(DiffusionLoss(torch.linspace(0.99, 0.1, 10)), ewc)


def settings(**options) -> TrainingConfig:
    defaults = {"num_train_steps": STEPS, "train_batch_size": 4, "learning_rate": 1e-2, "lr_warmup_steps": 2,
                "logging_steps": 1, "checkpointing_steps": 2, "ema_decay": 0.5}  # fmt: skip
    return TrainingConfig(**defaults | options)


def run(model: nn.Module, checkpoint_dir: Path | None = None, callback=None, **options) -> list[dict]:
    return train(
        model, selective_amnesia(model), batches, settings(**options),
        seed=3, checkpoint_dir=checkpoint_dir, callback=callback, callback_steps=1,
    )  # fmt: skip


def assert_same_weights(first: nn.Module, second: nn.Module, rtol=0.0, atol=0.0) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=rtol, atol=atol)


def interrupt_at(step: int):
    def callback(now: int, row: dict) -> None:
        if now == step:
            raise KeyboardInterrupt

    return callback


class Tracker(GeneralTracker):
    """Counts how often it was ended."""

    name, requires_logging_directory, tracker = "counter", False, None

    def __init__(self):
        super().__init__()
        self.ended = 0

    def store_init_configuration(self, values: dict) -> None: ...

    def log(self, values: dict, step: int | None = None, **_) -> None: ...

    def finish(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("callback", [None, interrupt_at(2)])
def test_a_tracker_is_ended_however_training_ends(callback):
    model, tracker, config = Denoiser(), Tracker(), settings()
    config.report_to = tracker
    with pytest.raises(KeyboardInterrupt) if callback else nullcontext():
        train(model, selective_amnesia(model), batches, config, seed=3, callback=callback, callback_steps=1)
    assert tracker.ended == 1


def test_trains_what_requires_a_gradient_and_nothing_else():
    model, before = Denoiser(), Denoiser()
    history = run(model)
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    assert set(history[0]) == {
        "step",
        "loss",
        "surrogate_loss",
        "replay_loss",
        "ewc_penalty",
        "grad_norm",
        "learning_rate",
    }
    assert history[0]["ewc_penalty"] == 0 < history[-1]["ewc_penalty"]
    torch.testing.assert_close(model.frozen, before.frozen, rtol=0, atol=0)
    assert (model.layers[0].weight - before.layers[0].weight).abs().min() > 1e-4
    assert not model.training


@pytest.mark.parametrize("average", [{"ema_decay": None}, {"ema_decay": 0.5}, {"ema_decay": 0.5, "ema_warmup": False}])
@pytest.mark.parametrize("stopped_at", [1, 3, 4, STEPS])
def test_resumed_equals_uninterrupted(tmp_path, average, stopped_at):
    whole, stopped, resumed = Denoiser(), Denoiser(), Denoiser()
    expected = run(whole, **average)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path, interrupt_at(stopped_at), **average)
    seen = []
    history = run(resumed, tmp_path, lambda step, row: seen.append(step), **average)
    assert seen == list(range((stopped_at - 1) // 2 * 2 + 1, STEPS + 1))
    assert history == expected
    assert_same_weights(resumed, whole)


class Dropping(Denoiser):
    def __init__(self, p: float = 0.5):
        super().__init__()
        self.layers.insert(2, nn.Dropout(p))


@pytest.mark.parametrize("stopped_at", [3, 4])
def test_dropout_depends_on_the_step_alone(tmp_path, stopped_at):
    """Not on what else draws from the global generator, whose state a checkpoint restores."""
    whole, stopped, resumed = Dropping(), Dropping(), Dropping()
    expected = run(whole, callback=lambda step, row: torch.rand(step).sum() < 0)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path, interrupt_at(stopped_at))
    assert run(resumed, tmp_path) == expected
    assert_same_weights(resumed, whole)


def test_every_step_drops_something_else():
    model, dropped = Dropping(), []

    def see(module, inputs, output):
        if module.training:  # the weights to be saved are looked at once more, as they will be used
            dropped.append((output == 0).flatten())

    model.layers[2].register_forward_hook(see)
    run(model)
    assert len(dropped) == len({tuple(mask.tolist()) for mask in dropped}) == STEPS


@pytest.mark.parametrize("model", [Denoiser(), Dropping(0.0)])
def test_without_dropout_the_global_generator_is_left_alone(model):
    before = torch.get_rng_state()
    run(model)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_piecewise_constant_learning_rate():
    history = run(Denoiser(), lr_scheduler="piecewise_constant", lr_step_rules="1:2,0.1:5,0.01", lr_warmup_steps=0)
    assert [row["learning_rate"] for row in history] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "piecewise_constant"}, "need each other, got piecewise_constant and None"),
        ({"lr_step_rules": "1:10,0.1"}, "need each other, got constant_with_warmup and '1:10,0.1'"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "10:1,"},
            "such as 1:1000,0.1:2000,0.01, got '10:1,'",
        ),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:0.5,2"}, "such as 1:1000,.* got '1:0.5,2'"),
    ],
)
def test_step_rules_and_their_schedule_need_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_a_finished_training_is_not_repeated(tmp_path):
    whole, again = Denoiser(), Denoiser()
    history = run(whole, tmp_path)
    seen = []
    assert run(again, tmp_path, lambda step, row: seen.append(step)) == history
    assert seen == []
    assert_same_weights(again, whole)


def test_an_early_stop_stays_stopped(tmp_path):
    """Interrupted after it stopped, at a step with a checkpoint, the same training must not go on beyond it."""
    stopped, again = Denoiser(), Denoiser()
    run(stopped, tmp_path, lambda step, row: step == 4)
    run(again, tmp_path, lambda step, row: step == 4)
    assert_same_weights(again, stopped)


def test_early_stop():
    model, shorter = Denoiser(), Denoiser()
    assert run(model, callback=lambda step, row: step == 3)[-1]["step"] == 3
    # A constant rate after warm-up: three steps of six are a training of three.
    run(shorter, num_train_steps=3)
    assert_same_weights(model, shorter)


def test_accumulation_changes_nothing_but_rounding():
    """EWC included: were its gradient added once a part, it would count twice."""
    models = [Denoiser() for _ in range(3)]
    histories = [run(m, gradient_accumulation_steps=n) for m, n in zip(models, (1, 2, 4), strict=True)]
    for model, history in zip(models[1:], histories[1:], strict=True):
        assert_same_weights(model, models[0], rtol=1e-4, atol=1e-6)
        for row, expected in zip(history, histories[0], strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ewc_is_added_once_a_step(accumulation):
    model, calls = Denoiser(), []
    objective = selective_amnesia(model)
    add = objective.ewc.add_gradient
    objective.ewc.add_gradient = lambda: calls.append(1) or add()
    train(model, objective, batches, settings(gradient_accumulation_steps=accumulation), seed=3)
    assert len(calls) == STEPS


def test_ewc_holds_the_weights():
    free, held = Denoiser(), Denoiser()
    train(free, selective_amnesia(free, 0.0), batches, settings(max_grad_norm=None), seed=3)
    train(held, selective_amnesia(held, 1e6), batches, settings(max_grad_norm=None), seed=3)
    start = Denoiser().layers[0].weight
    moved = [(m.layers[0].weight - start).square().sum().item() for m in (held, free)]
    assert moved[0] < 0.5 * moved[1]


def gradient_norm(parameters) -> float:
    return math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))


def test_the_gradient_is_clipped_with_ewc_in_it():
    model, before, after = Denoiser(), [], []
    objective = selective_amnesia(model, 1e4)
    add = objective.add_gradient
    objective.add_gradient = lambda: (add(), before.append(gradient_norm(model.parameters())))
    hook = register_optimizer_step_pre_hook(lambda *_: after.append(gradient_norm(model.parameters())))
    try:
        history = train(model, objective, batches, settings(max_grad_norm=0.1), seed=3)
    finally:
        hook.remove()
    assert [row["grad_norm"] for row in history] == pytest.approx(before, rel=1e-5)
    assert max(before) > 1
    assert after == pytest.approx([0.1] * STEPS, rel=1e-3)


def test_one_step_is_adamw_at_the_learning_rate_as_written():
    """Without warm-up the first AdamW step has the length of the learning rate in every weight, whatever the batch."""
    for accumulation in (1, 4):
        model = Denoiser()
        history = run(
            model, num_train_steps=1, lr_warmup_steps=0, ema_decay=None, gradient_accumulation_steps=accumulation
        )
        moved = (model.layers[0].weight - Denoiser().layers[0].weight).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)
        assert history[0]["learning_rate"] == 1e-2


class Wide(Denoiser):
    """Has a weight that is large enough for 8 bits: bitsandbytes leaves smaller ones than 4096 in 32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 4))


def test_8_bit_adam_comes_near_to_adam_and_resumes_exactly(tmp_path):
    pytest.importorskip("bitsandbytes")
    full, whole, stopped, resumed = Wide(), Wide(), Wide(), Wide()
    start = full.layers[2].weight.detach().clone()
    options = {"ema_decay": None, "checkpointing_steps": 3}
    run(full, **options)
    states = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: states.append(optimizer.state))
    try:
        history = run(whole, optimizer="adamw_8bit", **options)
    finally:
        hook.remove()
    dtypes = {values.dtype for state in states[-1].values() for name, values in state.items() if name == "state1"}
    assert dtypes == {torch.uint8, torch.float32}
    moved = [(model.layers[2].weight - start).detach() for model in (whole, full)]
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[1].norm()
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path, interrupt_at(4), optimizer="adamw_8bit", **options)
    assert run(resumed, tmp_path, optimizer="adamw_8bit", **options) == history
    assert_same_weights(resumed, whole)


def test_8_bit_adam_without_its_package_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(training_config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'adamw_8bit needs bitsandbytes, .* run pip install "sa_diffusers\[8bit\]"'):
        TrainingConfig(optimizer="adamw_8bit")


@pytest.mark.parametrize("warmup", [True, False])
def test_average_is_what_the_callback_sees_and_what_stays(warmup):
    """Decay as diffusers warms it up, 0 and then min(decay, n / (9 + n)) at step n; or constant, as the authors'."""
    raw, averaged, weights, seen = Denoiser(), Denoiser(), [], []
    run(raw, ema_decay=None, callback=lambda step, row: weights.append(raw.layers[0].bias.clone()))
    options = {"ema_decay": 0.5, "ema_warmup": warmup}
    run(averaged, callback=lambda step, row: seen.append(averaged.layers[0].bias.clone()), **options)
    expected = [Denoiser().layers[0].bias.detach()]
    for step, weight in enumerate(weights, 1):
        decay = 0.5 if not warmup else min(0.5, step / (9 + step)) if step > 1 else 0.0
        expected.append(decay * expected[-1] + (1 - decay) * weight)
    torch.testing.assert_close(seen, expected[1:])
    torch.testing.assert_close(averaged.layers[0].bias.detach(), expected[-1])


def test_checkpoint_limit(tmp_path):
    run(Denoiser(), tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000005", "step_0000006"]
    run(Denoiser(), tmp_path / "none", checkpointing_steps=None)
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_holds_what_training_changes_and_nothing_else(tmp_path):
    """Buffers too, and whole training goes on from it, as from one that holds more, of two processes."""
    whole, resumed = Denoiser(), Denoiser()
    for model in (whole, resumed):
        model.register_buffer("running", torch.ones(2))
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(resumed, tmp_path / "cut", interrupt_at(5))
    newest = tmp_path / "cut" / "step_0000004" / "model.safetensors"
    kept = load_file(newest)
    assert kept.keys() == trained | {"running"}
    save_file({f"module.{name}": tensor for name, tensor in (kept | {"frozen": torch.ones(4)}).items()}, newest)
    (newest.parent / "hashes.json").write_text("{}")
    resumed = Denoiser()
    resumed.register_buffer("running", torch.zeros(2))
    run(resumed, tmp_path / "cut")
    assert_same_weights(resumed, whole)


def test_a_checkpoint_without_a_trained_weight_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Denoiser(), tmp_path, interrupt_at(5))
    newest = tmp_path / "step_0000004"
    kept = load_file(newest / "model.safetensors")
    kept["renamed"] = kept.pop(lost := next(iter(kept)))
    save_file(kept, newest / "model.safetensors")
    (newest / "hashes.json").write_text("{}")
    with pytest.raises(ValueError, match=f"is of another model: {lost} is not in both"):
        run(Denoiser(), tmp_path)


def test_an_unfinished_checkpoint_is_not_resumed_from(tmp_path):
    whole, resumed = Denoiser(), Denoiser()
    run(whole, tmp_path)
    (tmp_path / "step_0000006").rename(tmp_path / "step_0000006.partial")
    (tmp_path / "step_0000006.partial" / "model.safetensors").write_bytes(b"half a fi")
    run(resumed, tmp_path)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize(
    ("files", "way"),
    [
        (["pytorch_model_fsdp_0/x.distcp"], "under FSDP2"),
        ([f"pytorch_model/zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(3)], "under DeepSpeed in 3 pro"),
    ],
)
def test_a_checkpoint_in_parts_is_not_resumed_from_with_whole_weights(tmp_path, files, way):
    run(Denoiser(), tmp_path)
    for name in files:
        (tmp_path / "step_0000006" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "step_0000006" / name).touch()
    with pytest.raises(ValueError, match=f"step_0000006 was written {way}.*, and this is with whole weights; resume"):
        run(Denoiser(), tmp_path)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_divergence_names_the_step_and_keeps_the_last_checkpoint(tmp_path, broken):
    model = Denoiser()
    objective = selective_amnesia(model)
    compute, calls = objective.__call__, []

    class Breaks:
        draw, add_gradient, regularisation = objective.draw, objective.add_gradient, objective.regularisation

        def __call__(self, model, batch):
            calls.append(1)
            loss, parts = compute(model, batch)
            if len(calls) == 6:
                loss = loss * math.nan if broken == "loss" else loss + (model.layers[0].bias * 0).sqrt().sum()
            return loss, parts

    with pytest.raises(TrainingDiverged, match=r"at step 6: one is not finite; the last good .*step_0000004"):
        train(model, Breaks(), batches, settings(), seed=3, checkpoint_dir=tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_0000002", "step_0000004"]
    whole, resumed = Denoiser(), Denoiser()
    run(whole)
    run(resumed, tmp_path)
    assert_same_weights(resumed, whole)


def test_a_gradient_that_a_scaler_skips_is_no_number_in_the_history(monkeypatch):
    """Without a scaler, which wants a GPU, by letting it pass."""
    monkeypatch.setattr("sa_diffusers.training.loop._Loop._check_finite", lambda *_: None)
    model = Denoiser()
    with torch.no_grad():
        model.layers[0].bias.fill_(math.inf)
    history = run(model)
    assert [row["grad_norm"] for row in history] == [None] * len(history) and history


def test_the_average_does_not_count_a_step_that_a_scaler_skips():
    """By a scaler for the CPU: accelerate makes one for a GPU alone."""
    accelerator, model = Accelerator(), Denoiser()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimisation = Optimisation(accelerator, model, settings(ema_decay=0.5, ema_warmup=False, lr_warmup_steps=0))
    averages = [model.layers[0].bias.detach().clone()]
    for scale in (1.0, math.inf, 1.0):
        loss = scale * model(torch.ones(2, 4), torch.zeros(2)).sample.sum()
        optimisation.backward(loss, last=True, add_gradient=lambda: None)
        optimisation.step()
        averages.append(optimisation.average.ema.shadow_params[1].clone())
    assert accelerator.scaler.get_scale() == 1.0  # halved by the step that was skipped
    assert not averages[1].equal(averages[0]) and averages[2].equal(averages[1]) and not averages[3].equal(averages[2])


def test_divergence_before_any_checkpoint():
    model = Denoiser()
    with torch.no_grad():
        model.layers[0].bias.fill_(math.inf)
    with pytest.raises(TrainingDiverged, match="step 1: .* no checkpoint was written yet"):
        run(model)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="train_batch_size 4 does not divide by 1 processes x 3 .* a multiple of 3"):
        run(Denoiser(), gradient_accumulation_steps=3)


def share_by_two(folder: str) -> None:
    """What each of two processes runs in the test below."""
    assert Accelerator().num_processes == 2
    model = Denoiser()
    with pytest.raises(KeyboardInterrupt):
        run(model, Path(folder) / "checkpoints", interrupt_at(5))
    model = Denoiser()
    history = run(model, Path(folder) / "checkpoints")
    torch.save({"weights": model.state_dict(), "history": history}, f"{folder}/{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Interrupted and resumed as well. The learning rate is the same too, so it is not scaled by the processes."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__,
         str(tmp_path)],
        check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    one = Denoiser()
    history = run(one)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result["weights"], one.state_dict(), rtol=1e-4, atol=1e-6)
        for row, expected in zip(result["history"], history, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


if __name__ == "__main__":
    share_by_two(sys.argv[1])


@pytest.mark.parametrize(
    "options", [{"num_train_steps": -5}, {"train_batch_size": 0}, {"learning_rate": -1.0}, {"max_grad_norm": 0.0}]
)
def test_numbers_out_of_range_are_refused_for_every_kind_of_training(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"expected {name} > 0, got"):
        TrainingConfig(**options)
