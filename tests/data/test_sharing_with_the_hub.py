"""What a run leaves, to and from others: Fishers, sample sets, saved pipelines, and the script that pushes them."""

import json
import re
import shutil
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from cheap_runs import interrupt_call
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from fake_hub import FakeHub, cache_repository
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from sa_diffusers import __version__
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import Fisher, FisherMismatch, estimate_fisher
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sharing import fetch_samples, load_fisher, load_samples, push_fisher, push_run, push_samples
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import RunFolderBusy, fingerprint, run_lock
from sa_diffusers.io.atomic_files import save_tensors, write_json
from sa_diffusers.io.hub import ModelLoadError, PushError, provenance
from sa_diffusers.io.loading import add_variant, check_files, load_pipeline, model_hash, save_pipeline
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.report.cards import write_model_card
from scripts import push


METADATA = {
    "model_hash": "ab12", "reduction": "mean", "num_terms": 20, "prediction_type": "epsilon", "terms": "3",
    "estimator": "two stratified draws", "num_samples": 5, "samples": "cd34", "seed": 0, "dtype": "float32",
    "total_relative_error": 0.051, "model": "someone/base", "revision": "0123abc", "version": "0.1.0",
}  # fmt: skip
KEY = {
    "model": {"unet": "ab12", "vae": "cd34"}, "num_samples": 2, "settings": {"guidance_scale": 7.5}, "seed": 0,
    "provenance": {"model": "someone/base", "revision": "0123abc", "version": "0.1.0"},
}  # fmt: skip


@pytest.fixture
def fisher() -> Fisher:
    """Values over sixteen powers of ten around those of a real Fisher, zeros, one value, and float32's extremes."""
    spread = 10 ** (torch.rand(40, 50) * 16 - 20)
    tensors = {"spread": spread, "zeros": torch.zeros(7), "one": torch.tensor([3e-9]), "none": torch.zeros(0, 3)}
    tensors |= {
        "large": torch.tensor([3e38, 1.0]),
        "small": torch.tensor([1e-38, 1e-44]),
        "smallest": torch.tensor([1e-44]),
    }
    return Fisher(tensors, dict(METADATA))


@pytest.fixture
def hub(monkeypatch) -> FakeHub:
    """In the place of the client that is used where none is given."""
    fake = FakeHub()
    monkeypatch.setattr("sa_diffusers.io.hub.HfApi", lambda: fake)
    monkeypatch.setattr("sa_diffusers.data.sharing.HfApi", lambda: fake)
    return fake


@pytest.fixture
def samples_dir(tmp_path) -> Path:
    """The samples/ folder of a run, with replay samples of one concept among them."""
    folder = tmp_path / "run" / "samples"
    latents = torch.randn(2, 4, 8, 8)
    SampleSet(latents, [Condition("a digit"), Condition()]).save(folder / "samples.safetensors")
    SampleSet(latents, [Condition("a digit"), Condition()]).save(folder / "without_concept.safetensors")
    (folder / "samples.png").write_bytes(b"png")
    write_json(KEY, folder / "samples.json")
    return folder


def assert_same(first: Fisher, second: Fisher) -> None:
    assert first.metadata == second.metadata
    torch.testing.assert_close(first.tensors, second.tensors, rtol=0, atol=0)


def test_float16_agrees_with_rounding_value_by_value(fisher, tmp_path):
    fisher.save(tmp_path / "fisher.safetensors", "float16")
    loaded = Fisher.load(tmp_path / "fisher.safetensors")
    assert loaded.metadata == METADATA | {"dtype": "float16"}
    for name, tensor in fisher.tensors.items():
        largest = max(tensor.flatten().tolist(), default=0.0)
        exponent = next((e for e in range(-200, 200) if largest * 2.0**e >= 2**14), 0) if largest else 0
        expected = [float(np.float16(x * 2.0**exponent)) / 2.0**exponent for x in tensor.flatten().tolist()]
        expected = torch.tensor(expected, dtype=torch.float32).view(tensor.shape)
        torch.testing.assert_close(loaded.tensors[name], expected, rtol=0, atol=0, msg=name)


def test_float16_keeps_the_precision_that_is_claimed(fisher, tmp_path):
    fisher.save(tmp_path / "fisher.safetensors", "float16")
    values, loaded = fisher.tensors["spread"].double(), Fisher.load(tmp_path / "fisher.safetensors").tensors["spread"]
    large = values > 4e-9 * values.max()
    assert 0.3 < large.double().mean() < 0.9  # else one of the two claims would not be tested
    torch.testing.assert_close(loaded[large].double(), values[large], rtol=2**-11, atol=0)
    torch.testing.assert_close(loaded[~large].double(), values[~large], rtol=0, atol=2e-12 * values.max().item())
    assert (loaded[values > 2e-12 * values.max()] > 0).all()


def test_float16_takes_half_the_room_and_is_not_misread_as_unscaled(fisher, tmp_path):
    fisher = Fisher({"spread": fisher.tensors["spread"].repeat(20, 1)}, METADATA)
    sizes, formats = {}, {}
    for dtype in ("float32", "float16"):
        fisher.save(tmp_path / dtype, dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
        with safe_open(tmp_path / dtype, "pt") as file:
            formats[dtype] = file.metadata()["format"]
    assert sizes["float16"] < 0.51 * sizes["float32"]
    # Versions that know no exponents know the first format alone.
    assert formats == {"float32": "sa_diffusers-fisher-1", "float16": "sa_diffusers-fisher-2"}
    with pytest.raises(ValueError, match="expected .* float32 or float16, got 'int8'"):
        fisher.save(tmp_path / "int8", "int8")
    assert not (tmp_path / "int8").exists()


def test_a_loaded_float16_fisher_is_saved_again_without_change(fisher, tmp_path):
    fisher.save(tmp_path / "1", "float16")
    loaded = Fisher.load(tmp_path / "1")
    for dtype in ("float16", "float32"):
        loaded.save(tmp_path / "2", dtype)
        assert_same(Fisher.load(tmp_path / "2"), loaded)


@pytest.mark.parametrize(
    "unit", [pytest.param(1.0, id="its own unit", marks=pytest.mark.slow), pytest.param(1e-9, id="a larger model's")]
)
def test_float16_of_the_bundled_model_s_fisher(tmp_path, unit):
    """Of two samples: few spread wider than many, so this is the harder case."""
    family = get_family(load_pipeline("bundled/digits/pipeline", None, None, "float32"))
    parameters = dict(family.module.eval().named_parameters())
    latents = torch.randn(2, *family.latent_shape)
    sums = estimate_fisher(
        family.module,
        family.loss,
        parameters,
        lambda i: family.batch(latents[[i]], [Condition("a seven")]),
        range(2),
        terms=2,
    )
    exact = {name: square * unit for name, square in sums.square.items()}
    Fisher(exact, METADATA).save(tmp_path / "fisher.safetensors", "float16")
    loaded = Fisher.load(tmp_path / "fisher.safetensors").tensors
    whole, rounded = (torch.cat([tensors[name].flatten().double() for name in exact]) for tensors in (exact, loaded))
    assert whole.half()[whole > 0].eq(0).double().mean() > (0.5 if unit < 1 else 0)  # what plain float16 loses
    assert rounded[whole > 0].eq(0).double().mean() < 1e-4
    error = ((rounded - whole).abs() / whole)[whole > 0]
    assert error.median() < 3e-4 and error.kthvalue(int(0.999 * len(error))).values < 2**-11
    torch.testing.assert_close(rounded.sum(), whole.sum(), rtol=1e-4, atol=0)


def test_files_of_the_first_version_load(fisher, tmp_path):
    """Without the fields that came later."""
    later = ("model", "revision", "version", "estimator", "dtype")
    old = Fisher(fisher.tensors, {name: value for name, value in METADATA.items() if name not in later})
    old.save(tmp_path / "fisher.safetensors")
    assert_same(Fisher.load(tmp_path / "fisher.safetensors"), old)
    with pytest.raises(FisherMismatch, match="^the Fisher belongs to another model or unit .model_hash: the Fisher"):
        old.check(model_hash="other")


def test_a_fisher_is_found_by_file_folder_and_hub_id(fisher, tmp_path):
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    commit = cache_repository("someone/fisher", {"fisher.safetensors": path.read_bytes()})
    for source in (path, str(path), tmp_path, "someone/fisher"):
        assert_same(load_fisher(source), fisher)
        assert_same(load_fisher(source), fisher)
    assert_same(load_fisher("someone/fisher", revision=commit), fisher)


def test_what_is_no_fisher_is_said(tmp_path):
    cache_repository("someone/weights", {"fisher.safetensors": b"something else"})
    with pytest.raises(FisherMismatch, match="is no readable Fisher"):
        load_fisher("someone/weights")
    with pytest.raises(FileNotFoundError, match=f"no Fisher at {tmp_path}/fisher.safetensors"):
        load_fisher(tmp_path)
    with pytest.raises(FileNotFoundError, match="no Fisher at typo.safetensors"):
        load_fisher("typo.safetensors")  # a well-formed hub id, but nobody would call a repository that
    with pytest.raises(ModelLoadError, match="'someone/typo' is not on this machine and the hub cannot be reached"):
        load_fisher("someone/typo")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_pushed_fisher_comes_back_with_its_card(fisher, hub, tmp_path, dtype):
    assert push_fisher(fisher, "someone/fisher", private=True, dtype=dtype) == "https://hub.example/someone/fisher"
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1]["private"] is True
    assert set(hub.files["someone/fisher"]) == {"fisher.safetensors", "README.md"}
    loaded = load_fisher("someone/fisher")
    fisher.save(tmp_path / "fisher.safetensors", dtype)
    assert_same(loaded, Fisher.load(tmp_path / "fisher.safetensors"))
    card = ModelCard(hub.files["someone/fisher"]["README.md"].decode())
    assert card.data.base_model == "someone/base"
    for text in (
        "# Fisher of someone/base",
        "--model someone/base",
        "--fisher someone/fisher",
        f"| id | {fingerprint(loaded.metadata)} |",  # what the card of a model made from it names
        f"| dtype | {dtype} |",
        "| revision | 0123abc |",
        "| total_relative_error | 0.051 |",
        "a mean over a sample's values, summed over 20 timesteps",
        "`someone/base`; look it up there",
    ):
        assert text in card.content


def test_the_licence_of_the_model_holds_for_its_fisher(fisher):
    cache_repository("someone/open", {"README.md": b"---\nlicense: openrail\n---\n"})
    fisher.metadata |= {"model": "someone/open", "revision": None}
    hub = FakeHub()
    push_fisher(fisher, "someone/fisher", api=hub)
    card = ModelCard(hub.files["someone/fisher"]["README.md"].decode())
    assert card.data.license == "openrail"
    assert "`someone/open`: openrail." in card.content


def test_another_model_is_refused_with_the_differing_fields(fisher, hub):
    push_fisher(fisher, "someone/fisher")
    fetched = load_fisher("someone/fisher")
    fetched.check(model_hash="ab12", reduction="mean")
    with pytest.raises(FisherMismatch, match="made of someone/base at 0123abc, belongs to another model") as error:
        fetched.check(model_hash="ef56", reduction="sum", num_terms=20)
    assert "model_hash: the Fisher has 'ab12', this run 'ef56'" in str(error.value)
    assert "reduction: the Fisher has 'mean', this run 'sum'" in str(error.value)
    assert "num_terms" not in str(error.value)


def test_a_fisher_push_that_fails_half_way_leaves_the_old_one(fisher, hub):
    push_fisher(fisher, "someone/fisher")
    before = dict(hub.files["someone/fisher"])
    newer = Fisher({"spread": torch.ones(3)}, METADATA | {"seed": 1})
    hub.fails["upload"] = ConnectionResetError("reset by peer")
    with pytest.raises(
        PushError, match="fisher.safetensors.*reset by peer.*Nothing is lost.*the Fisher is unchanged. Push it"
    ):
        push_fisher(newer, "someone/fisher")
    assert hub.files["someone/fisher"] == before
    assert_same(load_fisher("someone/fisher"), fisher)
    hub.fails.clear()
    push_fisher(newer, "someone/fisher")
    assert_same(load_fisher("someone/fisher"), newer)


def test_pushed_samples_come_back_without_those_of_one_concept(samples_dir):
    hub = FakeHub()
    push_samples(samples_dir, "someone/samples", api=hub)
    assert {call["repo_type"] for name, call in hub.calls if name != "whoami"} == {"dataset"}
    names = {"README.md", "samples.json", "samples.png", "samples.safetensors"}
    assert set(hub.files["someone/samples"]) == names
    folder = fetch_samples("someone/samples")
    assert json.loads((folder / "samples.json").read_text()) == KEY
    sent, found = (SampleSet.load(path / "samples.safetensors") for path in (samples_dir, folder))
    torch.testing.assert_close(found.latents, sent.latents, rtol=0, atol=0)
    assert found.conditions == sent.conditions
    card = hub.files["someone/samples"]["README.md"].decode()
    for text in (
        "# Samples of someone/base", "--samples someone/samples", "![The first of them](samples.png)",
        "| settings.guidance_scale | 7.5 |", "| revision | 0123abc |", "| vae | cd34 |",
    ):  # fmt: skip
        assert text in card
    assert fetch_samples(samples_dir) == samples_dir


def test_samples_in_half_the_room_are_others(samples_dir):
    hub = FakeHub()
    push_samples(samples_dir, "someone/samples", dtype="float16", api=hub)
    found, sent = load_samples("someone/samples"), load_samples(samples_dir)
    torch.testing.assert_close(found.latents, sent.latents.half().float(), rtol=0, atol=0)
    assert found.conditions == sent.conditions
    assert json.loads(hub.files["someone/samples"]["samples.json"]) == KEY | {"dtype": "float16"}
    assert "| dtype | float16 |" in hub.files["someone/samples"]["README.md"].decode()
    with pytest.raises(FileNotFoundError, match="expected the samples/ folder of a run"):
        load_samples(samples_dir.parent)


def test_samples_of_older_runs_are_pushed_without_a_model_s_name(samples_dir):
    write_json({name: value for name, value in KEY.items() if name != "provenance"}, samples_dir / "samples.json")
    (samples_dir / "samples.png").unlink()
    hub = FakeHub()
    push_samples(samples_dir, "someone/samples", api=hub)
    card = hub.files["someone/samples"]["README.md"].decode()
    assert "| unet | ab12 |" in card
    assert "samples.png" not in card


def test_samples_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="it lacks samples.json and samples.safetensors; pass the samples/ folder"):
        push_samples(tmp_path, "someone/samples", api=FakeHub())
    assert fetch_samples(tmp_path / "typo") == tmp_path / "typo"  # for its reader to refuse
    with pytest.raises(ModelLoadError, match="`hf download someone/none --repo-type dataset`"):
        fetch_samples("someone/none")


def test_provenance_tells_the_commit_and_no_local_path(tmp_path):
    commit = cache_repository("someone/base", {"model_index.json": b"{}"})
    assert provenance("someone/base", None) == {"model": "someone/base", "revision": commit, "version": __version__}
    assert provenance(str(tmp_path / "mine" / "pipeline"), None)["model"] == "mine"


@pytest.fixture
def finished_run(samples_dir, fisher) -> Path:
    """As much of a finished run as is pushed."""
    run = samples_dir.parent
    fisher.save(run / "fisher.safetensors")
    notes = {"text_encoders": ["0a1b"], "prompts": ["a red nine"], "provenance": {"model": "someone/base"}}
    save_tensors({"tokens": torch.ones(1, 1, 4)}, run / "speed_retained.safetensors", **notes)
    for part in ("pipeline", "lora"):
        (run / part).mkdir()
        (run / part / "README.md").write_text(f"card of the {part}")
        (run / part / "weights.safetensors").write_bytes(part.encode())
    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.name != ".lock"
            if path.is_file()}  # fmt: skip


ALL = {part: f"someone/{part}" for part in ("pipeline", "lora", "fisher", "samples", "speed_retained")}


def test_push_run_pushes_each_part(finished_run, fisher):
    hub, before = FakeHub(), snapshot(finished_run)
    urls = push_run(finished_run, ALL, private=True, fisher_dtype="float16", api=hub)
    assert urls == {part: f"https://hub.example/someone/{part}" for part in ALL}
    assert all(call["private"] for name, call in hub.calls if name == "create_repo")
    assert hub.files["someone/pipeline"]["weights.safetensors"] == b"pipeline"
    assert hub.files["someone/lora"]["README.md"] == b"card of the lora"
    assert load_fisher("someone/fisher").metadata == METADATA | {"dtype": "float16"}
    assert len(SampleSet.load(fetch_samples("someone/samples") / "samples.safetensors")) == 2
    pushed, kept = hub.files["someone/speed_retained"], finished_run / "speed_retained.safetensors"
    assert pushed["speed_retained.safetensors"] == kept.read_bytes()
    card = pushed["README.md"].decode()
    assert "someone/base" in card and "--speed_retained someone/speed_retained" in card and "| 1 | 0a1b |" in card
    assert snapshot(finished_run) == before


def test_push_run_that_fails_half_way_goes_on_by_the_same_command(finished_run):
    class FailsAtTheFisher(FakeHub):
        def upload_folder(self, *, repo_id, **options):
            if repo_id == "someone/fisher" and self.fails:
                raise self.fails["fisher"]
            super().upload_folder(repo_id=repo_id, **options)

    hub, before = FailsAtTheFisher(fisher=ConnectionResetError("reset by peer")), snapshot(finished_run)
    with pytest.raises(PushError, match="fisher: The push to someone/fisher failed: reset by peer") as error:
        push_run(finished_run, ALL, api=hub)
    assert "On the hub already: https://hub.example/someone/pipeline, https://hub.example/someone/lora" in str(
        error.value
    )
    assert hub.files["someone/fisher"] == {}
    assert "someone/samples" not in hub.files
    assert snapshot(finished_run) == before
    hub.fails.clear()
    push_run(finished_run, ALL, api=hub)
    assert set(hub.files) == set(ALL.values()) and all(hub.files.values())


def test_push_run_refuses_before_anything_is_pushed(finished_run, tmp_path):
    hub = FakeHub()
    (finished_run / "lora" / "README.md").unlink()
    with pytest.raises(ValueError, match="does not hold lora .*run/lora/README.md.*not finished"):
        push_run(finished_run, ALL, api=hub)
    with pytest.raises(ValueError, match="a repository of its own for each part"):
        push_run(finished_run, {"pipeline": "someone/x", "fisher": "someone/x"}, api=hub)
    with pytest.raises(PushError, match="expected user/name"):
        push_run(finished_run, {"pipeline": "someone/x", "fisher": "a/b/c"}, api=hub)
    with pytest.raises(RunFolderBusy), run_lock(finished_run):
        push_run(finished_run, {"pipeline": "someone/x"}, api=hub)
    assert hub.files == {}


def test_the_script_pushes_what_it_is_told_to(finished_run, hub, capsys):
    push.main([str(finished_run), "--fisher", "someone/fisher", "--samples", "someone/fisher", "--private"])
    assert capsys.readouterr().out == "".join(
        f"{part}: https://hub.example/someone/fisher\n" for part in ("fisher", "samples")
    )
    assert [call["repo_type"] for name, call in hub.calls if name == "create_repo"] == ["model", "dataset"]
    with pytest.raises(SystemExit, match="2"):
        push.main([str(finished_run)])
    assert "the repository of at least one part: --pipeline, --lora, --fisher, --samples" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        push.main([str(finished_run / "nowhere"), "--pipeline", "someone/x"])
    assert "error: " in (err := capsys.readouterr().err) and "does not hold pipeline" in err


def test_fp16_variant_lies_beside_the_full_precision(tiny_pipeline, safety_checker, tmp_path):
    pipeline = tiny_pipeline(safety_checker=safety_checker, feature_extractor=CLIPImageProcessor())
    plain, both = tmp_path / "plain", tmp_path / "both"
    save_pipeline(pipeline, plain, pipeline.unet, "float32")
    before = {name: model_hash(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    save_pipeline(pipeline, both, pipeline.unet, "float32", "fp16")
    assert before == {name: model_hash(getattr(pipeline, name)) for name in before}
    same, added = snapshot(plain), snapshot(both)
    assert {name: added[name] for name in same} == same
    assert {name for name in added if name not in same} == {
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors", "safety_checker/model.fp16.safetensors",
    }  # fmt: skip
    for part in ("unet", "vae"):
        half = load_file(both / part / "diffusion_pytorch_model.fp16.safetensors")
        expected = {name: value.half() for name, value in getattr(pipeline, part).state_dict().items()}
        torch.testing.assert_close(half, expected, rtol=0, atol=0)


def test_both_variants_load_by_stock_diffusers(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    save_pipeline(pipeline, tmp_path / "both", pipeline.unet, "float32", "fp16")
    full = StableDiffusionPipeline.from_pretrained(tmp_path / "both", dtype=torch.float32)
    for part in (tmp_path / "both").rglob("*.safetensors"):
        if "fp16" not in part.name:
            part.unlink()
    half = StableDiffusionPipeline.from_pretrained(tmp_path / "both", variant="fp16", dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        for loaded, dtype in ((full, torch.float32), (half, torch.float16)):
            expected = {name: value.to(dtype) for name, value in getattr(pipeline, part).state_dict().items()}
            torch.testing.assert_close(dict(getattr(loaded, part).state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_loads_plainly_and_in_half_where_asked(tiny_pipeline, tmp_path, variant):
    """transformers takes its precision from the configuration, diffusers float32: pictures need one of all parts."""
    pipeline = tiny_pipeline().to(torch.float16)
    save_pipeline(pipeline, tmp_path / "half", pipeline.unet.float(), "float16", variant)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "half", variant=variant)
    assert plain("a red seven", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    half = StableDiffusionPipeline.from_pretrained(tmp_path / "half", variant=variant, dtype=torch.float16)
    for loaded, dtype in ((plain, torch.float32), (half, torch.float16)):
        assert {getattr(loaded, part).dtype for part in ("unet", "vae", "text_encoder")} == {dtype}


def test_the_variant_of_a_pipeline_of_ours(tmp_path):
    pipeline = ConditionalVAEPipeline(ConditionalVAE(image_size=4, num_classes=3, hidden_sizes=(5, 4), latent_dim=2))
    save_pipeline(pipeline, tmp_path / "vae", pipeline.vae, "float32", "fp16")
    half = ConditionalVAEPipeline.from_pretrained(tmp_path / "vae", variant="fp16", dtype=torch.float16)
    assert {value.dtype for value in half.vae.state_dict().values()} == {torch.float16}


def test_a_variant_whose_saving_was_stopped_is_saved_again(tiny_pipeline, tmp_path, monkeypatch):
    """In several files, where the list of them alone, or all but that, may have been written."""
    pipeline, folder = tiny_pipeline(), tmp_path / "pipeline"
    save_pipeline(pipeline, folder, pipeline.unet, "float32")
    save = partialmethod(type(pipeline.unet).save_pretrained, max_shard_size="5KB")
    monkeypatch.setattr(type(pipeline.unet), "save_pretrained", save)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_call(patch, shutil, "move", 2)
        add_variant(pipeline, folder, "fp16")
    add_variant(pipeline, folder, "fp16")
    check_files(str(folder), "fp16")
    half = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16)
    expected = {name: value.half() for name, value in pipeline.unet.state_dict().items()}
    torch.testing.assert_close(dict(half.unet.state_dict()), expected, rtol=0, atol=0)
    (next(folder.glob("unet/*-of-*fp16*.safetensors"), None) or next(folder.glob("unet/*fp16-*.safetensors"))).unlink()
    check_files(str(folder), None)  # what nobody asks for need not be whole
    with pytest.raises(ModelLoadError, match="lacks .*fp16"):
        check_files(str(folder), "fp16")


def test_a_variant_of_another_name_is_refused_and_one_that_fails_leaves_nothing(tiny_pipeline, tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="expected the variant fp16 or none, got 'int8'"):
        save_pipeline(pipeline, tmp_path / "pipeline", pipeline.unet, "float32", "int8")
    monkeypatch.setattr(shutil, "move", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pipeline(pipeline, tmp_path / "pipeline", pipeline.unet, "float32", "fp16")
    assert list(tmp_path.iterdir()) == []


def run_card(folder: Path, **replacements: Path) -> dict:
    """Run the Python of a card as a reader would, with the paths filled in; its variables."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[1]
    code = code.replace("path/or/hub-id/of/this/model", str(folder))
    for name, path in replacements.items():
        code = code.replace(name, str(path))
    variables = {}
    exec(compile(code, "README.md", "exec"), variables)
    return variables


def card_of(folder: Path, **options: object) -> None:
    texts = {"base_model": "base", "concept": "seven", "surrogate": "nine", "method": "Selective Amnesia"}
    texts |= {"pipeline_class": "StableDiffusionPipeline", "dtype": "float32", "variant": None, "requests": None}
    write_model_card(folder, **texts | options, settings={}, metrics=None, images=[], license=None)


def test_the_code_on_a_pipeline_s_card_runs(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    save_pipeline(pipeline, tmp_path / "pipeline", pipeline.unet, "float32", "fp16")
    card_of(tmp_path / "pipeline", dtype="float32", variant="fp16")
    loaded = run_card(tmp_path / "pipeline")["pipeline"]
    assert type(loaded) is StableDiffusionPipeline
    assert model_hash(loaded.unet) == model_hash(tiny_pipeline().unet)


def test_the_code_on_the_card_of_a_bundled_pipeline_s_lora_finds_it(tmp_path):
    card_of(tmp_path, lora=True, base_model="bundled/digits/pipeline")
    code = (tmp_path / "README.md").read_text()
    assert 'from_pretrained(resolve("bundled/digits/pipeline"), dtype=torch.float32)' in code
    assert "from sa_diffusers.io.bundled import resolve" in code and "nothing but" not in code


def test_the_code_on_a_lora_s_card_runs(tiny_pipeline, tmp_path, monkeypatch):
    """It ends with a plain pipeline whose weights have changed by the LoRA."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    base = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, "forget")
    change = {
        name: part.get_delta_weight("forget").detach()
        for name, part in pipeline.unet.named_modules()
        if name.endswith("to_q")
    }
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="forget"),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["forget"].to_dict(),
    )
    card_of(tmp_path / "lora", lora=True)
    run_card(tmp_path / "lora", **{'"base"': f'"{tmp_path / "base"}"'})
    forgotten = DiffusionPipeline.from_pretrained(tmp_path / "forgotten").unet.state_dict()
    expected = dict(base)
    for name, delta in change.items():
        expected[f"{name}.weight"] = base[f"{name}.weight"] + delta
    assert len(change) > 0
    torch.testing.assert_close(dict(forgotten), expected, rtol=0, atol=1e-6)
