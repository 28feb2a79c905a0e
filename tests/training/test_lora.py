"""Forgetting in a LoRA: which layers get an adapter, EWC on the effective change, files that stock diffusers loads."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_text_to_image import make
from torch.testing import assert_close

from sa_diffusers.core.objectives import LowRankChange, LowRankEWC
from sa_diffusers.families import get_family
from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.training.lora import (
    ADAPTER,
    LORA_FILE,
    WithoutLora,
    add_lora,
    fuse_lora,
    save_lora,
    save_lora_for_others,
)


PROMPTS = ["a red seven on black", "a blue two"]


@pytest.fixture
def unet(tiny_pipeline):
    return tiny_pipeline().unet


def call(unet, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, 8, generator=generator)
    with torch.no_grad():
        return unet(noisy, torch.tensor([3, 11]), encoder_hidden_states=text).sample


def adapted(unet, scope: str = "full", targets: str = "attention+conv", seed: int = 0) -> dict[str, LowRankChange]:
    """Adapters of rank 2 and scaling 3 whose B is not zero any more."""
    changes = add_lora(unet, adapted_layers(unet, scope, targets), 2, 6.0, seed)
    torch.manual_seed(5)
    for change in changes.values():
        torch.nn.init.normal_(change.up, std=0.3)
    return changes


def image(pipeline) -> torch.Tensor:
    images = pipeline(PROMPTS, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(1))
    return images.images


class TestLayers:
    def test_attention_is_its_projections(self, unet):
        layers = adapted_layers(unet, "full", "attention")
        assert {name.split(".")[-1] for name in layers} == {"to_q", "to_k", "to_v", "0"}
        assert all({"attn1", "attn2"} & set(name.split(".")) for name in layers)

    def test_convolutions_besides(self, unet):
        layers = adapted_layers(unet, "full", "attention+conv")
        assert set(adapted_layers(unet, "full", "attention")) < set(layers)
        assert {"conv_in", "conv_out", "mid_block.resnets.0.conv1"} <= set(layers)

    @pytest.mark.parametrize(
        ("scope", "inside", "outside"), [("xattn", "attn2", "attn1"), ("noxattn", "attn1", "attn2")]
    )
    def test_scope(self, unet, scope, inside, outside):
        components = {part for name in adapted_layers(unet, scope, "attention+conv") for part in name.split(".")}
        assert inside in components
        assert outside not in components
        assert "conv_out" not in components

    def test_nothing_left_is_refused(self):
        block = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(3)})})
        with pytest.raises(ValueError, match="leave no layer to adapt"):
            adapted_layers(block, "xattn", "attention")


class TestAdapter:
    def test_changes_nothing_at_first_and_alone_is_trained(self, unet):
        before = call(unet)
        changes = add_lora(unet, adapted_layers(unet, "full", "attention"), 2, 2.0, seed=0)
        assert_close(call(unet), before, rtol=0, atol=0)
        trained = {id(p) for p in unet.parameters() if p.requires_grad}
        assert trained == {id(p) for change in changes.values() for p in (change.up, change.down)}

    def test_seed_decides_and_global_state_is_left_alone(self, tiny_pipeline):
        def downs(seed: int, noise: int) -> list[torch.Tensor]:
            unet = tiny_pipeline().unet
            torch.manual_seed(noise)
            changes = add_lora(unet, adapted_layers(unet, "full", "attention"), 2, 2.0, seed)
            assert_close(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(noise)), rtol=0, atol=0)
            return [change.down.detach() for change in changes.values()]

        assert_close(downs(4, 1), downs(4, 2), rtol=0, atol=0)
        assert not torch.equal(downs(4, 1)[0], downs(5, 1)[0])

    def test_delta_is_what_fusing_adds(self, unet):
        before = {name: p.detach().clone() for name, p in unet.named_parameters()}
        changes = adapted(unet)
        deltas = {name: change.delta().detach() for name, change in changes.items()}
        with_adapter = call(unet)
        fuse_lora(unet)
        after = dict(unet.named_parameters())
        assert after.keys() == before.keys()
        for name, weight in after.items():
            expected = before[name] + deltas[name].view_as(weight) if name in deltas else before[name]
            assert_close(weight.detach(), expected)
        assert_close(call(unet), with_adapter, rtol=1e-4, atol=1e-5)

    def test_without_it_the_module_is_the_one_before_and_trains_on(self, unet):
        before = call(unet)
        changes = adapted(unet)
        changed = call(unet)
        assert (changed - before).abs().max() > 1e-2
        assert_close(call(WithoutLora(unet)), before, rtol=0, atol=0)
        assert_close(call(unet), changed, rtol=0, atol=0)
        assert all(change.up.requires_grad and change.down.requires_grad for change in changes.values())


class TestEWC:
    @pytest.mark.parametrize("targets", ["attention", "attention+conv"])
    def test_equals_autograd_in_float64(self, unet, targets):
        unet.double()
        changes = adapted(unet, targets=targets)
        fisher = {name: torch.rand(p.shape, dtype=torch.float64) for name, p in unet.named_parameters()}
        fisher = {name.replace(".base_layer", ""): value for name, value in fisher.items()}
        layers = dict(unet.named_modules())
        oracle = 0.7 * sum(
            (fisher[name] * layers[name.removesuffix(".weight")].get_delta_weight(ADAPTER).square()).sum()
            for name in changes
        )
        matrices = [p for change in changes.values() for p in (change.up, change.down)]
        expected = torch.autograd.grad(oracle, matrices)
        ewc = LowRankEWC(changes, fisher, 0.7, torch.float64)
        for matrix in matrices:
            matrix.grad = torch.ones_like(matrix)  # adds to what is there
        ewc.add_gradient()
        assert_close([matrix.grad - 1 for matrix in matrices], list(expected), rtol=1e-9, atol=1e-12)
        assert_close(ewc.value(), oracle.detach())

    def test_is_zero_at_first_and_makes_gradients_where_there_are_none(self, unet):
        changes = add_lora(unet, adapted_layers(unet, "full", "attention"), 2, 2.0, seed=0)
        ewc = LowRankEWC(changes, {name: torch.ones(len(c.up), *c.down.shape[1:]) for name, c in changes.items()}, 1.0)
        assert ewc.value() == 0
        ewc.add_gradient()
        assert all((p.grad == 0).all() for change in changes.values() for p in (change.up, change.down))

    def test_bfloat16_fisher_is_near(self, unet):
        changes = adapted(unet)
        fisher = {name: torch.rand(len(c.up), *c.down.shape[1:]) for name, c in changes.items()}
        exact, rounded = (LowRankEWC(changes, fisher, 1.0, dtype) for dtype in (torch.float32, torch.bfloat16))
        assert rounded.fisher[0].dtype == torch.bfloat16
        assert_close(rounded.value(), exact.value(), rtol=2e-3, atol=0)

    def test_adapters_over_half_precision_are_float32(self, unet):
        changes = adapted(unet.to(torch.bfloat16))
        assert {p.dtype for change in changes.values() for p in (change.up, change.down)} == {torch.float32}
        assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}

    @pytest.mark.parametrize("wrong", ["missing", "size", "nan", "lambda"])
    def test_wrong_input_is_refused(self, unet, wrong):
        changes = adapted(unet, targets="attention")
        fisher = {name: torch.ones(len(c.up), *c.down.shape[1:]) for name, c in changes.items()}
        name = next(iter(fisher))
        if wrong == "missing":
            del fisher[name]
        elif wrong == "size":
            fisher[name] = fisher[name][:, :-1]
        elif wrong == "nan":
            fisher[name][0, 0] = torch.nan
        message = {
            "missing": "missing from",
            "size": "another shape",
            "nan": "not finite",
            "lambda": "ewc_lambda >= 0",
        }
        with pytest.raises(ValueError, match=message[wrong]):
            LowRankEWC(changes, fisher, -1.0 if wrong == "lambda" else 1.0)


class TestFile:
    @pytest.mark.slow
    def test_stock_diffusers_switches_scales_and_fuses(self, tiny_pipeline, tmp_path):
        pipeline = tiny_pipeline()
        adapted(pipeline.unet)
        expected = image(pipeline)
        save_lora(get_family(pipeline), tmp_path / "lora", "float32")
        assert [path.name for path in (tmp_path / "lora").iterdir()] == [LORA_FILE]

        stock: StableDiffusionPipeline = tiny_pipeline()
        before = image(stock)
        stock.load_lora_weights(tmp_path / "lora", adapter_name="without_seven")
        assert_close(image(stock), expected, rtol=1e-4, atol=1e-4)  # alpha is in the file: a scaling of 3
        stock.set_adapters(["without_seven"], [0.0])
        assert_close(image(stock), before, rtol=1e-4, atol=1e-4)
        stock.set_adapters(["without_seven"], [1.0])
        stock.fuse_lora()
        stock.unload_lora_weights()
        stock.save_pretrained(tmp_path / "plain")
        plain = StableDiffusionPipeline.from_pretrained(tmp_path / "plain")
        plain.set_progress_bar_config(disable=True)
        assert_close(image(plain), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["v1", "xl"])
    @pytest.mark.slow
    def test_kohyas_names_are_read_back(self, tiny_pipeline, tiny_tokenizer, tmp_path, name):
        pipeline, stock = (tiny_pipeline() if name == "v1" else make(name, tiny_tokenizer) for _ in range(2))
        adapted(pipeline.unet, targets="attention+conv" if name == "v1" else "attention")
        save_lora(get_family(pipeline), tmp_path / "lora", "float32")
        save_lora_for_others(get_family(pipeline), tmp_path / "lora" / LORA_FILE, 6.0, tmp_path / "kohya.safetensors")
        named = load_file(tmp_path / "kohya.safetensors")
        assert all(n.startswith("lora_unet_") and n.count(".") <= 2 for n in named)
        assert {float(tensor) for n, tensor in named.items() if n.endswith(".alpha")} == {6.0}
        stock.load_lora_weights(tmp_path / "kohya.safetensors")
        assert_close(image(stock), image(pipeline), rtol=1e-2, atol=5e-3)

    @pytest.mark.slow
    def test_unloading_brings_the_concept_back(self, tiny_pipeline, tmp_path):
        pipeline = tiny_pipeline()
        adapted(pipeline.unet)
        save_lora(get_family(pipeline), tmp_path / "lora", "float32")
        stock = tiny_pipeline()
        before = image(stock)
        stock.load_lora_weights(tmp_path / "lora")
        assert (image(stock) - before).abs().max() > 1e-3
        stock.unload_lora_weights()
        assert_close(image(stock), before, rtol=0, atol=0)

    def test_says_its_rank_and_alpha_and_takes_a_dtype(self, tiny_pipeline, tmp_path):
        pipeline = tiny_pipeline()
        adapted(pipeline.unet)
        save_lora(get_family(pipeline), tmp_path / "lora", "float16")
        with safe_open(tmp_path / "lora" / LORA_FILE, "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
        assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 6.0)
