"""Autocast around forward passes: what it changes, what it leaves alone, and that every stage goes through it."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers import DDIMScheduler
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import estimate_fisher
from sa_diffusers.families import get_family
from sa_diffusers.models.precision import (
    autocast_forward,
    compute_dtype,
    in_main_memory,
    kept_weights,
    mixed_precision,
    on_device,
    release,
)
from sa_diffusers.runs.stages.fisher import float16_scale
from sa_diffusers.training.lora import add_lora


@pytest.fixture
def unet(tiny_pipeline):
    return tiny_pipeline().unet


def inputs() -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(0)
    text = {"encoder_hidden_states": torch.randn(2, 12, 8, generator=generator)}
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 11]), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU computes in natively")
@pytest.mark.parametrize(
    "found, precision, dtype",
    [({}, "no", None), ({"avx512_bf16": True}, "bf16", torch.bfloat16), ({"amx_bf16": True}, "bf16", torch.bfloat16)],
)
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(monkeypatch, found, precision, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True} | found)
    assert (mixed_precision("auto"), compute_dtype("auto")) == (precision, dtype)
    assert (mixed_precision("no"), compute_dtype("no")) == ("no", None)  # whatever the device is made for


class TestAutocast:
    def test_computes_in_the_dtype_and_returns_float32(self, unet):
        noisy, steps, text = inputs()
        seen = []
        handle = unet.conv_in.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        with torch.no_grad():
            exact = unet(noisy, steps, **text).sample
            with autocast_forward(unet, torch.bfloat16):
                rough = unet(noisy, steps, **text).sample
            again = unet(noisy, steps, **text).sample
        handle.remove()
        assert seen == [torch.float32, torch.bfloat16, torch.float32]
        assert rough.dtype == torch.float32
        assert_close(rough, exact, rtol=0, atol=0.05)
        assert not torch.equal(rough, exact)
        assert_close(again, exact, rtol=0, atol=0)

    def test_gradients_are_those_of_float32_weights_after_a_pass_without(self, unet):
        noisy, steps, text = inputs()
        with autocast_forward(unet, torch.bfloat16):
            with torch.no_grad():
                unet(noisy, steps, **text)
            unet(noisy, steps, **text).sample.square().mean().backward()
        gradients = [p.grad for p in unet.parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        assert sum(bool(g.any()) for g in gradients) > len(gradients) // 2

    def test_none_is_no_autocast_and_errors_undo_it(self, unet):
        with autocast_forward(unet, None):
            assert "forward" not in vars(unet)
        with pytest.raises(RuntimeError, match="stop"), autocast_forward(unet, torch.bfloat16):
            assert "forward" in vars(unet)
            raise RuntimeError("stop")
        assert "forward" not in vars(unet)

    def test_a_wrapped_forward_is_put_back(self, unet):
        wrapped = unet.forward
        unet.forward = wrapped  # as accelerate leaves it
        with autocast_forward(unet, torch.bfloat16):
            assert unet.forward is not wrapped
        assert vars(unet)["forward"] is wrapped

    def test_a_compiled_module_is_compiled_once_for_all_entries(self):
        module, counter = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU()), CompileCounter()
        torch.compiler.reset()
        module.compile(backend=counter)
        for _ in range(4):
            with torch.no_grad(), autocast_forward(module, torch.bfloat16):
                assert module(torch.ones(1, 2)).dtype == torch.float32
        assert counter.frame_count == 1

    def test_a_copy_computes_with_its_own_weights(self, unet):
        noisy, steps, text = inputs()
        with torch.no_grad():
            with autocast_forward(unet, torch.bfloat16):
                before = unet(noisy, steps, **text).sample
            other = copy.deepcopy(unet)
            other.conv_out.weight.zero_()
            with autocast_forward(other, torch.bfloat16):
                assert not torch.equal(other(noisy, steps, **text).sample, before)
            with autocast_forward(unet, torch.bfloat16):
                assert_close(unet(noisy, steps, **text).sample, before, rtol=0, atol=0)

    def test_a_released_module_goes_with_its_last_user(self, unet):
        noisy, steps, text = inputs()
        other = copy.deepcopy(unet)
        with torch.no_grad(), autocast_forward(other, torch.bfloat16):
            other(noisy, steps, **text)
        release(other)
        gone = weakref.ref(other)
        gc.disable()  # so that only the last user's going frees it
        try:
            del other
            assert gone() is None
        finally:
            gc.enable()

    def test_which_dtype(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert compute_dtype(None) == torch.bfloat16
        assert compute_dtype("no") is None
        assert compute_dtype("fp16") == torch.float16
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
        assert compute_dtype(None) is None


class TestFamily:
    def test_draws_in_the_dtype_and_keeps_latents_in_float32(self, tiny_pipeline):
        pipeline = tiny_pipeline()
        seen = []
        pipeline.unet.conv_in.register_forward_hook(
            lambda module, given, out: seen.append((given[0].dtype, out.dtype))
        )
        exact, rough = (
            get_family(pipeline, compute_dtype=dtype).draw([Condition("a red seven")], [0], 2.0, 3)
            for dtype in (None, torch.bfloat16)
        )
        assert set(seen[:3]) == {(torch.float32, torch.float32)}
        assert set(seen[3:]) == {(torch.float32, torch.bfloat16)}  # the sampler's state is not rounded between steps
        assert_close(rough, exact, rtol=0, atol=0.2)
        assert "forward" not in vars(pipeline.unet)

    def test_prompts_are_encoded_once(self, tiny_pipeline):
        pipeline = tiny_pipeline()
        family = get_family(pipeline)
        calls = []
        pipeline.text_encoder.register_forward_hook(lambda *given: calls.append(1))
        asked = [Condition("a red seven"), Condition("a blue two")]
        family.prepare(asked)
        family.draw(asked[:1], [0], 2.0, 1)  # the empty prompt is new
        family.batch(torch.zeros(2, 4, 8, 8), asked)
        assert len(calls) == 3


class TestFisher:
    def test_the_loss_scale_cancels(self, tiny_pipeline):
        pipeline = tiny_pipeline()
        family = get_family(pipeline)
        parameters = dict(pipeline.unet.named_parameters())
        batch = family.batch(torch.randn(1, 4, 8, 8), [Condition("a red seven")])
        plain, scaled = (
            estimate_fisher(
                family.module, family.loss, parameters, lambda i: batch, [0], terms=3, loss_scale=scale
            ).square
            for scale in (None, 256.0)
        )
        assert_close(plain, scaled, rtol=1e-4, atol=1e-12)

    @pytest.mark.parametrize(("terms", "timesteps"), [(3, 900), (None, 200)])
    def test_float16_neither_overflows_nor_loses_it(self, tiny_pipeline, terms, timesteps):
        """With terms that weigh 300, as of as many timesteps as Stable Diffusion has; and with many that weigh 1."""
        scheduler = DDIMScheduler(num_train_timesteps=timesteps, clip_sample=False, steps_offset=1)
        pipeline = tiny_pipeline()
        pipeline.scheduler = scheduler
        family = get_family(pipeline, compute_dtype=torch.float16)
        parameters = dict(pipeline.unet.named_parameters())
        batch = family.batch(torch.randn(1, 4, 8, 8), [Condition("a red seven")])

        def estimate(scale: float | None, dtype: torch.dtype | None) -> torch.Tensor:
            with autocast_forward(family.module, dtype):
                sums = estimate_fisher(
                    family.module, family.loss, parameters, lambda i: batch, [0], terms=terms, loss_scale=scale
                )
            return torch.cat([value.flatten() for value in sums.square.values()])

        exact, half = estimate(None, None), estimate(float16_scale(family), torch.float16)
        assert_close(half.sum(), exact.sum(), rtol=0.02, atol=0)
        assert ((half == 0) & (exact > 1e-6 * exact.max())).sum() == 0


class Moved(torch.nn.Linear):
    """Writes down where it is sent; no second device computes here."""

    def __init__(self):
        super().__init__(2, 2, device="meta")
        self.moves: list[str] = []

    def to(self, device):
        self.moves.append(str(device))
        return self


class TestPlaces:
    def test_a_module_is_fetched_and_sent_home_even_after_an_error(self):
        module = Moved()
        with pytest.raises(RuntimeError, match="stop"), on_device(module, torch.device("cuda")) as there:
            assert there is module
            assert module.moves == ["cuda"]
            raise RuntimeError("stop")
        assert module.moves == ["cuda", "meta"]

    def test_a_module_that_is_there_is_not_moved(self):
        module = Moved()
        with on_device(module, torch.device("meta")) as there:
            assert there is module
        assert module.moves == []

    def test_helpers_wait_in_main_memory(self):
        modules = [Moved(), Moved()]
        with pytest.raises(RuntimeError, match="stop"), in_main_memory(modules):
            assert [module.moves for module in modules] == [["cpu"], ["cpu"]]
            raise RuntimeError("stop")
        assert [module.moves for module in modules] == [["cpu", "meta"]] * 2


def test_weights_are_kept_where_a_training_with_adapters_is_stopped(tiny_pipeline):
    family = get_family(tiny_pipeline())
    before = copy.deepcopy(family.module.state_dict())
    with pytest.raises(KeyboardInterrupt), kept_weights(family.module):
        add_lora(family.module, family.adapted_layers("full", "attention"), 2, 2, seed=0)
        raise KeyboardInterrupt
    assert_close(family.module.state_dict(), before, rtol=0, atol=0)
