"""Options that make a run small, fast or shared: a LoRA, mixed precision, EWC and Fisher in main memory, variants."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cheap_runs import CHEAP, context_of
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

import sa_diffusers.runs.stages.train
from sa_diffusers.core.fisher import Fisher
from sa_diffusers.families import get_family
from sa_diffusers.runs.forget import Outcome, forget
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.plan import trained_bytes
from sa_diffusers.runs.stages.fisher import sums_device
from sa_diffusers.training.lora import LORA_FILE


pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(scope="module")
def start(run_cheaply) -> Callable[..., Outcome]:
    """Run in a folder, from the saved pipeline, with some options changed."""
    return run_cheaply


@pytest.fixture(scope="module")
def plain_dir(start, tmp_path_factory) -> Path:
    """A run with none of the options; do not write into it."""
    return start(tmp_path_factory.mktemp("plain") / "run").output_dir


@pytest.fixture(scope="module")
def lora_dir(start, tmp_path_factory) -> Path:
    """A run in a LoRA; do not write into it."""
    return start(tmp_path_factory.mktemp("lora") / "run", lora_rank=2, lora_targets="attention+conv").output_dir


@pytest.fixture(scope="module")
def rough_dir(start, tmp_path_factory) -> Path:
    """A run in bfloat16 wherever that can be said, saved in float16, too; do not write into it."""
    options = {"mixed_precision": "bf16", "ewc_dtype": "bfloat16", "save_variant": "fp16"}
    return start(tmp_path_factory.mktemp("rough") / "run", gradient_checkpointing=True, **options).output_dir


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
class TestLora:
    def test_the_file_gives_the_saved_pipeline(self, lora_dir, tiny_pipeline_dir):
        stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
        before = {name: p.clone() for name, p in stock.unet.state_dict().items()}
        stock.load_lora_weights(lora_dir / "lora")
        stock.fuse_lora()
        stock.unload_lora_weights()
        fused = unet_of(lora_dir)
        assert_close(dict(stock.unet.state_dict()), dict(fused), rtol=1e-5, atol=1e-6)
        changed = {name for name, p in fused.items() if not torch.equal(p, before[name])}
        assert changed
        assert all(name.endswith(".weight") for name in changed)

    def test_ewc_is_on_the_effective_change(self, lora_dir):
        history = json.loads((lora_dir / "history.json").read_text())
        assert history[0]["ewc_penalty"] == 0
        assert history[-1]["ewc_penalty"] > 0

    @pytest.mark.slow
    def test_full_fine_tuning_has_the_same_fisher(self, lora_dir, plain_dir):
        fisher, again = (Fisher.load(folder / "fisher.safetensors").tensors for folder in (lora_dir, plain_dir))
        assert_close(fisher, again, rtol=0, atol=0)

    def test_cards_and_pictures_lie_beside_both(self, lora_dir):
        assert {path.name for path in (lora_dir / "lora").iterdir()} == {LORA_FILE, "README.md", "before_after.png"}
        assert "load_lora_weights" in (lora_dir / "lora" / "README.md").read_text()
        assert "load_lora_weights" not in (lora_dir / "pipeline" / "README.md").read_text()

    @pytest.mark.slow
    def test_resumes_to_the_same_weights_and_reuses(self, start, lora_dir, tmp_path, monkeypatch):
        options = {"lora_rank": 2, "lora_targets": "attention+conv", "checkpointing_steps": 2}

        whole = sa_diffusers.runs.stages.train.train

        def stopped(*arguments, **keywords):
            def batches(step, draw=arguments[2]):
                if step == 3:
                    raise KeyboardInterrupt
                return draw(step)

            return whole(*arguments[:2], batches, *arguments[3:], **keywords)

        options |= {"samples": str(lora_dir / "samples"), "fisher": str(lora_dir / "fisher.safetensors")}
        monkeypatch.setattr("sa_diffusers.runs.stages.train.train", stopped)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run", **options)
        monkeypatch.undo()
        start(tmp_path / "run", **options)
        first, second = (load_file(folder / "lora" / LORA_FILE) for folder in (lora_dir, tmp_path / "run"))
        assert_close(first, second, rtol=1e-4, atol=1e-5)  # prompts were encoded in other batches
        reused = start(tmp_path / "run", **options)
        assert "train" in reused.metrics["seconds"]["reused"]
        assert_close(dict(reused.pipeline.unet.state_dict()), dict(unet_of(lora_dir)), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_in_python_the_result_is_plain(self, tiny_pipeline, start, tmp_path):
        pipeline = tiny_pipeline()
        names = set(pipeline.unet.state_dict())
        forgotten = forget(pipeline, "seven", "nine", lora_rank=2, **CHEAP | {"ewc_lambda": 0.0, "replay_weight": 0.0})
        assert set(forgotten.unet.state_dict()) == set(pipeline.unet.state_dict()) == names
        forgotten.save_pretrained(tmp_path / "saved")
        assert_close(
            dict(StableDiffusionPipeline.from_pretrained(tmp_path / "saved").unet.state_dict()),
            dict(forgotten.unet.state_dict()),
            rtol=0,
            atol=0,
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"lora_alpha": 4.0}, "lora_alpha needs lora_rank"), ({"lora_rank": 0}, "lora_rank > 0"),
         ({"lora_rank": 2, "method": "naive"}, "adapters are not trained by naive")],
    )  # fmt: skip
    def test_wrong_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ForgetConfig(**options)


class TestMemory:
    @pytest.mark.slow
    def test_where_things_are_kept_changes_nothing(self, start, plain_dir, tmp_path):
        start(tmp_path / "run", fisher_device="cpu", ewc_device="cpu", channels_last=True, offload=False)
        assert_close(unet_of(tmp_path / "run"), unet_of(plain_dir), rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_bfloat16_everywhere_stays_near(self, plain_dir, rough_dir):
        exact, rough = (Fisher.load(folder / "fisher.safetensors").tensors for folder in (plain_dir, rough_dir))
        total = sum(float(tensor.sum()) for tensor in exact.values())
        assert sum(float(tensor.sum()) for tensor in rough.values()) == pytest.approx(total, rel=0.1)
        moved, near = unet_of(plain_dir), unet_of(rough_dir)
        assert {tensor.dtype for tensor in near.values()} == {torch.float32}
        assert_close(near, moved, rtol=0, atol=0.05)

    @pytest.mark.slow
    def test_samples_of_another_precision_are_not_taken_for_ones_own(self, plain_dir, rough_dir):
        key = json.loads((rough_dir / "samples" / "samples.json").read_text())
        assert key["compute_dtype"] == "bfloat16"
        assert "compute_dtype" not in json.loads((plain_dir / "samples" / "samples.json").read_text())

    def test_a_fisher_in_main_memory_is_asked_for_or_for_want_of_room(self, tiny_pipeline):
        family = get_family(tiny_pipeline())
        for asked in ("auto", "device", "cpu"):
            assert sums_device(family, ForgetConfig(concept="seven", fisher_device=asked)).type == "cpu"

    def test_the_plan_counts_bytes(self, tiny_pipeline, tmp_path):
        family = get_family(tiny_pipeline())
        weights = sum(p.numel() for p in family.module.parameters())

        def planned(**options) -> int:
            return trained_bytes(context_of(family, tmp_path, **options))

        assert planned() == weights * (4 + 8 + 4 + 4)  # gradients, Adam, Fisher, a frozen copy that is the anchor too
        assert planned(replay_target="noise") == planned()  # an anchor of its own
        assert planned(ewc_dtype="bfloat16") == weights * (4 + 8 + 2 + 4)
        assert planned(ewc_device="cpu") == weights * (4 + 8 + 4)
        assert planned(ema_decay=0.9) == planned() + 4 * weights
        assert planned(lora_rank=1, ewc_lambda=0.0) < 0.1 * planned()


class TestCompile:
    @pytest.mark.slow
    def test_a_compiled_module_gives_the_same(self, start, plain_dir, tmp_path):
        drawn = {"samples": str(plain_dir / "samples"), "before": str(plain_dir)}
        outcome = start(tmp_path / "run", compile_backend="aot_eager", **drawn)
        assert_close(unet_of(tmp_path / "run"), unet_of(plain_dir), rtol=1e-4, atol=1e-5)
        assert outcome.pipeline.unet._compiled_call_impl is None


class TestVariant:
    @pytest.mark.slow
    def test_float16_files_lie_beside(self, rough_dir):
        half = StableDiffusionPipeline.from_pretrained(rough_dir / "pipeline", variant="fp16", dtype=torch.float16)
        whole = StableDiffusionPipeline.from_pretrained(rough_dir / "pipeline")
        assert half.unet.dtype == torch.float16
        expected = {name: p.half() for name, p in whole.unet.state_dict().items()}
        assert_close(dict(half.unet.state_dict()), expected, rtol=0, atol=0)
