"""ESD against a slow reference in float64 and the stock sampler; its sum with Selective Amnesia; sharing a batch."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import ESD, ElasticWeightConsolidation, SelectiveAmnesia, SelectiveAmnesiaWithESD
from sa_diffusers.families import get_family
from sa_diffusers.training.loop import TrainingConfig, train
from sa_diffusers.training.lora import WithoutLora


T, LEVELS = 20, 5
# By level, the timesteps at which a sampler of 5 steps over 20 timesteps (leading spacing, offset 1) runs the model on
# its way there, and the timestep whose noise is then left.
PATHS = {0: ([17, 13, 9, 5], 1), 1: ([17, 13, 9], 5), 2: ([17, 13], 9), 3: ([17], 13), 4: ([], 17)}
AUTHORS_PATHS = {0: ([13, 9, 5, 1], 0), 1: ([13, 9, 5, 1], 0), 2: ([13, 9, 5], 1), 3: ([13, 9], 5), 4: ([13], 9)}


@pytest.fixture
def family(tiny_pipeline):
    """Real Stable Diffusion in float64, its scheduler too."""
    return get_family(in_float64(tiny_pipeline()))


def in_float64(pipeline):
    pipeline.unet.double()
    pipeline.scheduler.alphas_cumprod = pipeline.scheduler.alphas_cumprod.double()
    pipeline.scheduler.final_alpha_cumprod = pipeline.scheduler.alphas_cumprod[0]
    return pipeline


def moved(module: nn.Module) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return other


def make_batch(family) -> dict:
    latents = torch.zeros(2, *family.latent_shape, dtype=torch.float64)
    named = [Condition("seven"), Condition("a 7")]
    batch = {"concept": family.batch(latents, named), "empty": family.batch(latents, [Condition()] * 2)}
    return {n: part | {"encoder_hidden_states": part["encoder_hidden_states"].double()} for n, part in batch.items()}


def make_esd(family, frozen: nn.Module, **options) -> ESD:
    return ESD(family.loss, frozen, family.pipeline.scheduler, num_inference_steps=LEVELS, **options)


def at_level(esd: ESD, batch: dict, level: int) -> dict:
    """A drawn batch of that level."""
    for seed in range(100):
        drawn = esd.draw(batch, torch.Generator().manual_seed(seed))
        if int(drawn["level"][0]) == level:
            return drawn
    raise AssertionError(f"level {level} was never drawn")


def predict(unet, x: Tensor, timestep: int, condition: Tensor) -> Tensor:
    return unet(x, timestep, encoder_hidden_states=condition).sample


def reference_latent(unet, x, path, end, concept, empty, alphas, guidance) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12, sigma 0) for one row, one model call at a time."""
    for timestep, following in zip(path, [*path, end][1:], strict=True):
        a, b = alphas[timestep], alphas[following]
        unconditional = predict(unet, x, timestep, empty)
        noise = unconditional + guidance * (predict(unet, x, timestep, concept) - unconditional)
        x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
    return x


@pytest.mark.parametrize(
    ("authors_latents", "eta", "guidance", "reduction"),
    [
        (False, 0.0, 7.5, "mean"),
        pytest.param(True, 2.5, 1.0, "sum", marks=pytest.mark.slow),
        pytest.param(False, 1.0, 3.0, "sum", marks=pytest.mark.slow),
        pytest.param(True, 1.0, 3.0, "mean", marks=pytest.mark.slow),
    ],  # fmt: skip
)
def test_loss_and_gradient_equal_a_slow_reference(family, reduction, eta, guidance, authors_latents):
    unet, alphas = family.module, family.pipeline.scheduler.alphas_cumprod
    frozen = moved(unet)
    family.loss.reduction = reduction
    esd = make_esd(family, frozen, negative_guidance=eta, start_guidance=guidance, authors_latents=authors_latents)
    batch = make_batch(family)
    for level, (path, end) in (AUTHORS_PATHS if authors_latents else PATHS).items():
        drawn = at_level(esd, batch, level)
        total, parts = esd(unet, drawn)
        assert parts == {}
        rows = []
        for i in range(2):
            concept, empty = (batch[n]["encoder_hidden_states"][i : i + 1] for n in ("concept", "empty"))
            timestep = int(drawn["terms"][i])
            with torch.no_grad():
                x = reference_latent(unet, drawn["noise"][i : i + 1], path, end, concept, empty, alphas, guidance)
                named, unnamed = predict(frozen, x, timestep, concept), predict(frozen, x, timestep, empty)
            error = (predict(unet, x, timestep, concept) - (unnamed - eta * (named - unnamed))).square()
            rows.append(error.mean() if reduction == "mean" else error.sum())
        expected = sum(rows) / 2
        assert_close(total, expected, rtol=1e-9, atol=1e-12)
        gradients = [
            torch.autograd.grad(value, list(unet.parameters()), allow_unused=True) for value in (total, expected)
        ]
        assert_close(*gradients, rtol=1e-7, atol=1e-10)
    assert all(p.grad is None for p in frozen.parameters())


def test_latents_are_those_of_the_stock_pipeline(tiny_pipeline):
    """Stopped on its way, after 0 to 4 of 5 steps, in float32."""
    pipeline = tiny_pipeline()
    family, seen = get_family(pipeline), []
    esd = make_esd(family, None)
    batch = {
        n: family.batch(torch.zeros(2, *family.latent_shape), [Condition(p)] * 2)
        for n, p in [("concept", "seven"), ("empty", "")]
    }

    def keep(pipe, step: int, timestep: int, values: dict) -> dict:
        seen.append(values["latents"])
        return values

    for level in range(LEVELS):
        drawn = at_level(esd, batch, level)
        seen[:] = [drawn["noise"]]
        pipeline(
            ["seven"] * 2, latents=drawn["noise"], guidance_scale=3.0, num_inference_steps=LEVELS,
            output_type="latent", callback_on_step_end=keep,
        )  # fmt: skip
        assert len(seen) == LEVELS + 1
        assert_close(esd.partly_denoised(family.module, drawn), seen[LEVELS - 1 - level], rtol=1e-4, atol=1e-5)


class Denoiser(nn.Module):
    """Any prediction of (noisy, timesteps, condition); called as every UNet of diffusers."""

    def __init__(self, alphas: Tensor | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        self.alphas = alphas  # not None: predicts v, and the same noise as without
        self.calls = 0

    def forward(self, noisy, timesteps, condition):
        self.calls += 1
        noise = self.layers(noisy + condition + timesteps[:, None] / T)
        if self.alphas is not None:
            alpha = self.alphas[timesteps][:, None]
            noise = (noise - (1 - alpha).sqrt() * noisy) / alpha.sqrt()
        return SimpleNamespace(sample=noise)


def small(prediction_type: str = "epsilon", levels: int = LEVELS, seed: int = 0, **options) -> tuple[Denoiser, ESD]:
    scheduler = DDIMScheduler(T, clip_sample=False, prediction_type=prediction_type)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    loss = DiffusionLoss(scheduler.alphas_cumprod, prediction_type)
    model = Denoiser(scheduler.alphas_cumprod if prediction_type == "v_prediction" else None)
    return model, ESD(loss, moved(model), scheduler, num_inference_steps=levels, **options)


def small_batch(size: int = 4, seed: int = 0, prompts: int = 4) -> dict:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(size) % prompts
    conditions = {n: torch.randn(prompts, 6, generator=generator).double()[rows] for n in ("concept", "empty")}
    return {n: {"sample": torch.zeros(size, 6).double(), "condition": value} for n, value in conditions.items()}


def test_a_model_of_v_learns_the_same_noise():
    """At a given x_t the noise is sqrt(alpha_bar) v + const, so squared errors differ by a factor alpha_bar alone."""
    (noise_model, noise_esd), (v_model, v_esd) = small(), small("v_prediction")
    v_esd.frozen.load_state_dict(noise_esd.frozen.state_dict())
    for level in range(LEVELS):
        drawn = at_level(noise_esd, small_batch(1), level)
        assert_close(v_esd.partly_denoised(v_model, drawn), noise_esd.partly_denoised(noise_model, drawn))
        alpha = noise_esd.loss.alphas_cumprod[drawn["terms"][0]]
        assert_close(v_esd(v_model, drawn)[0] * alpha, noise_esd(noise_model, drawn)[0])


def test_draws():
    """Every level and timestep occurs; a level is that of the whole batch and stands for timesteps of its own."""
    _, esd = small()
    batch, levels, terms = small_batch(8), set(), set()
    for seed in range(60):
        drawn = esd.draw(batch, torch.Generator().manual_seed(seed))
        level = int(drawn["level"][0])
        assert drawn["level"].eq(level).all()
        assert set(drawn["terms"].tolist()) <= set(range(4 * level, 4 * level + 4))
        levels.add(level)
        terms |= set(drawn["terms"].tolist())
    assert levels == set(range(LEVELS)) and terms == set(range(T))
    again = esd.draw(batch, torch.Generator().manual_seed(59))
    assert_close(again, drawn, rtol=0, atol=0)
    assert drawn["noise"].shape == (8, 6) and 0.5 < drawn["noise"].std() < 1.5
    assert set(drawn["concept"]) == set(drawn["empty"]) == {"condition"}
    assert_close(drawn["empty"]["condition"], batch["empty"]["condition"])
    _, uneven = small(levels=3)  # 20 timesteps do not divide by 3: none is left out
    seen = {int(t) for s in range(60) for t in uneven.draw(batch, torch.Generator().manual_seed(s))["terms"]}
    assert seen == set(range(T))


def test_the_scheduler_of_the_caller_stays_as_it_is(family):
    scheduler = family.pipeline.scheduler
    scheduler.set_timesteps(7)
    assert_close(make_esd(family, None).scheduler.timesteps, torch.tensor([17, 13, 9, 5, 1]))
    assert len(scheduler.timesteps) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_guidance": -1.0}, "expected negative_guidance >= 0, got -1.0"),
        ({"start_guidance": -0.5}, "expected start_guidance >= 0, got -0.5"),
        ({"levels": T + 1}, "from 2 to the model's 20 timesteps, got 21"),
        ({"levels": 1}, "from 2 to the model's 20 timesteps, got 1"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_another_number_of_empty_prompts_is_refused():
    _, esd = small()
    with pytest.raises(ValueError, match=r"as many rows .* got samples \[1, 6\] and \[4, 6\]"):
        esd.draw(small_batch(4) | {"empty": small_batch(1)["empty"]}, torch.Generator())


def parts_of_amnesia(seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {key: torch.randn(4, 6, generator=generator).double() for key in ("sample", "condition")}
        for name in ("surrogate", "replayed")
    }


def test_hybrid_is_the_sum_of_both():
    """Terms, gradients, EWC and the random numbers of Selective Amnesia, which are those that it has without ESD."""
    model, esd = small()
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    ewc = ElasticWeightConsolidation(dict(model.named_parameters()), fisher, 2.0)
    hybrid = SelectiveAmnesiaWithESD(esd, ewc, replay_weight=0.5, frozen=esd.frozen, esd_weight=3.0)
    amnesia = SelectiveAmnesia(esd.loss, ewc, replay_weight=0.5, frozen=esd.frozen)
    batch = parts_of_amnesia() | {"esd": small_batch()}
    batch["replayed"]["distilled"] = torch.tensor([True, False, True, False])
    drawn = hybrid.draw(batch, torch.Generator().manual_seed(5))
    assert drawn["esd"]["level"][0] < LEVELS - 1  # x_t is sampled
    alone = amnesia.draw(batch, torch.Generator().manual_seed(5))
    assert_close({name: drawn[name] for name in alone}, alone, rtol=0, atol=0)

    total, parts = hybrid(model, drawn)
    (amnesia_loss, amnesia_parts), (esd_loss, _) = amnesia(model, alone), esd(model, drawn["esd"])
    assert esd_loss > 0.01
    assert_close(total, amnesia_loss + 3.0 * esd_loss)
    assert_close(parts, amnesia_parts | {"esd_loss": esd_loss.detach()})
    weights = list(model.parameters())
    expected = torch.autograd.grad(amnesia_loss + 3.0 * esd_loss, weights)
    assert_close(torch.autograd.grad(total, weights), expected)
    with torch.no_grad():
        weights[0] += 1
    hybrid.add_gradient()
    assert_close(weights[0].grad, 4.0 * fisher["layers.0.weight"])
    assert_close(hybrid.regularisation(), {"ewc_penalty": 2.0 * fisher["layers.0.weight"].sum()})


def test_hybrid_of_weight_zero_is_selective_amnesia():
    model, esd = small()
    hybrid = SelectiveAmnesiaWithESD(esd, None, esd_weight=0.0)
    drawn = hybrid.draw(parts_of_amnesia() | {"esd": small_batch()}, torch.Generator().manual_seed(5))
    calls = model.calls
    assert_close(hybrid(model, drawn), SelectiveAmnesia(esd.loss, None)(model, drawn))
    assert model.calls == calls + 2
    with pytest.raises(ValueError, match="expected esd_weight >= 0, got -1"):
        SelectiveAmnesiaWithESD(esd, None, esd_weight=-1)


def test_a_frozen_model_without_weights_of_its_own_takes_the_copy_that_is_trained():
    """Though only ESD asks it."""
    model, esd = small()
    esd.frozen = WithoutLora(model)
    copied = copy.deepcopy(model)
    SelectiveAmnesiaWithESD(esd, None).attach({}, copied)
    assert esd.frozen.module is copied


def run(hybrid: bool, parts: int = 1, steps: int = 4, one_prompt: bool = False) -> tuple[dict, list[dict]]:
    """Weights and history of a short training, on other prompts every step or always on the same one."""
    model, esd = small()
    model.float(), esd.frozen.float()
    objective = SelectiveAmnesiaWithESD(esd, None) if hybrid else esd

    def batches(step: int) -> dict:
        batch = small_batch(prompts=1) if one_prompt else small_batch(seed=step)
        batch = parts_of_amnesia(seed=step) | {"esd": batch} if hybrid else batch
        return in_float32(batch)

    config = TrainingConfig(
        num_train_steps=steps, train_batch_size=4, learning_rate=1e-2, logging_steps=1, checkpointing_steps=None,
        gradient_accumulation_steps=parts, max_grad_norm=None, adam_epsilon=1e-3,
    )  # fmt: skip
    history = train(model, objective, batches, config, seed=3)
    return model.state_dict(), history


def in_float32(batch: dict) -> dict:
    return {key: in_float32(value) if isinstance(value, dict) else value.float() for key, value in batch.items()}


def assert_same_run(result: tuple, expected: tuple) -> None:
    assert_close(result[0], expected[0], rtol=1e-4, atol=1e-6)
    for row, other in zip(result[1], expected[1], strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("hybrid", [False, True])
def test_training_in_parts_equals_training_at_once(hybrid):
    once = run(hybrid)
    assert_same_run(run(hybrid, parts=2), once)
    assert once[1][0]["loss"] != pytest.approx(once[1][-1]["loss"], rel=1e-3)


@pytest.mark.slow
def test_trained_long_enough_it_predicts_the_target():
    _, history = run(hybrid=False, steps=300, one_prompt=True)
    losses = [row["loss"] for row in history]
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__,
         str(tmp_path)],
        check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    for hybrid in (False, True):
        expected = run(hybrid)
        for rank in (0, 1):
            assert_same_run(torch.load(tmp_path / f"{hybrid}_{rank}.pt"), expected)


if __name__ == "__main__":  # what each of the two processes runs
    for with_amnesia in (False, True):
        torch.save(run(with_amnesia), f"{sys.argv[1]}/{with_amnesia}_{os.environ['RANK']}.pt")
