"""What lets a large model fit: half precision under a LoRA, and a Fisher of the trained layers alone."""

import pytest
import torch
from cheap_runs import CHEAP, PROMPTS, context_of
from tiny_text_to_image import make
from torch.testing import assert_close

from sa_diffusers.core.fisher import estimate_fisher
from sa_diffusers.core.fisher_file import Fisher, FisherMismatch
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families import get_family
from sa_diffusers.runs import plan
from sa_diffusers.runs.forget import forget


LORA = {"lora_rank": 2, "lora_targets": "attention+conditioning", "fisher_layers": "trained", "learning_rate": 0.01}
NAMES = [pytest.param(n, marks=() if n == "sd3" else pytest.mark.slow) for n in ("v1", "xl", "sd3", "flux-dev")]


@pytest.fixture
def pipeline(request, tiny_pipeline, tiny_tokenizer):
    return tiny_pipeline() if request.param == "v1" else make(request.param, tiny_tokenizer)


@pytest.fixture
def options(few_pictures, tmp_path) -> dict:
    (tmp_path / "replay.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "templates.txt").write_text("a {}\na red {}")
    files = {"replay_prompts": str(tmp_path / "replay.txt"), "concept_templates": str(tmp_path / "templates.txt")}
    return CHEAP | files | {"concept": "seven", "surrogate": "nine", "ewc_lambda": 1.0}


@pytest.mark.parametrize("pipeline", NAMES, indirect=True)
@pytest.mark.slow
def test_a_lora_over_weights_in_half_precision(pipeline, options, tmp_path, monkeypatch):
    trained = get_family(pipeline).component
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    whole = {name: weight.clone() for name, weight in getattr(pipeline, trained).state_dict().items()}
    seen = []

    def watch(module: torch.nn.Module, *_: object) -> None:
        seen.append({name: parameter.dtype for name, parameter in module.named_parameters()})

    monkeypatch.setattr(type(getattr(pipeline, trained)), "forward", watched(type(getattr(pipeline, trained)), watch))
    forgotten = forget(pipeline, mixed_precision="bf16", output_dir=tmp_path / "run", **options | LORA)
    during = [dtypes for dtypes in seen if any("lora_A" in name for name in dtypes)]
    assert {dtype for one in during for name, dtype in one.items() if "lora_" in name} == {torch.float32}
    assert {dtype for one in seen for name, dtype in one.items() if "lora_" not in name} == {torch.bfloat16}
    fisher = Fisher.load(tmp_path / "run" / "fisher.safetensors")
    layers = get_family(pipeline).adapted_layers("full", "attention+conditioning")
    assert (
        set(fisher.tensors) == {f"{name}.weight" for name in layers} and fisher.metadata["layers"] == "those trained"
    )
    after = getattr(forgotten, trained).state_dict()
    changed = {name for name, weight in after.items() if not weight.equal(whole[name])}
    assert changed and changed <= set(fisher.tensors) and {w.dtype for w in after.values()} == {torch.bfloat16}
    with pytest.raises(FisherMismatch, match="fewer layers than this run trains"):
        forget(pipeline, output_dir=tmp_path / "full", fisher=str(tmp_path / "run"), **options)


def watched(cls: type, watch):
    forward = cls.forward

    def run(self, *arguments, **named):
        watch(self)
        return forward(self, *arguments, **named)

    return run


def test_half_precision_gradients_are_squared_and_added_in_float32(tiny_tokenizer):
    family = get_family(make("sd3", tiny_tokenizer))
    names = ["transformer_blocks.0.attn.to_q.weight"]
    batch = family.batch(torch.randn(1, *family.latent_shape, generator=seeded(0, "x")), [family.example])

    def estimated(dtype: torch.dtype) -> torch.Tensor:
        family.module.to(dtype).requires_grad_(False)
        chosen = {name: family.module.get_parameter(name).requires_grad_(True) for name in names}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            sums = estimate_fisher(family.module, family.loss, chosen, lambda _: batch, [0], terms=5, chunk_size=2)
        return sums.square[names[0]]

    exact, rough = estimated(torch.float32), estimated(torch.bfloat16)
    assert rough.dtype == torch.float32
    assert_close(rough.sum(), exact.sum(), rtol=0.05, atol=0)
    # A square of what bfloat16 holds has more digits than bfloat16 does.
    assert not rough.equal(rough.bfloat16().float())


def test_encoded_prompts_that_fill_main_memory_are_announced(tiny_pipeline, tmp_path, monkeypatch):
    context = context_of(get_family(tiny_pipeline()), tmp_path)
    context.inputs.prompts += [f"a digit, {index}" for index in range(40)] * 2
    assert plan._embeddings(context) == []
    each = context.family.embed(["a digit, 3"])["encoder_hidden_states"].nbytes
    monkeypatch.setattr(plan, "MUCH", 40 * each - 1)
    assert plan._embeddings(context) == ["up to 0 GB of main memory for 40 encoded prompts"]
