"""Run folders as they come: damaged, without what nothing needs, on a full disk, of a model that forgot before."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cheap_runs import CHEAP, PROMPTS, context_of
from diffusers import DiffusionPipeline
from fake_hub import FakeHub, cache_repository
from safetensors.torch import load_file

from sa_diffusers.cli.verify import verify
from sa_diffusers.core.concepts import mentions
from sa_diffusers.data.sharing import push_run
from sa_diffusers.families import get_family
from sa_diffusers.io.configuration import config_from_dict, config_to_yaml
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
from sa_diffusers.runs.forget import forget, run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.plan import disk_bytes
from sa_diffusers.training.checkpoints import damaged


UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"
OPTIONS = CHEAP | {
    "concept": "seven, 7", "surrogate": "nine", "checkpointing_steps": 2, "ema_decay": 0.5, "lora_rank": 2,
    "lora_targets": "attention",
}  # fmt: skip
UCE = {"method": "uce", "num_inference_steps": 2, "guidance_scale": 2.0, "eval_batch_size": 16}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's own folder, whose name is to stay on this machine."""
    return tmp_path_factory.mktemp("alice-of-this-machine")


@pytest.fixture(scope="module")
def finished_dir(home, tiny_pipeline_dir) -> Path:
    """One finished run, all of whose paths lie in the user's folder; copy it before changing it."""
    shutil.copytree(tiny_pipeline_dir, home / "base")
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    (home / "templates.txt").write_text("a {}\na red {}")
    files = {"replay_prompts": str(home / "prompts.txt"), "concept_templates": str(home / "templates.txt")}
    values = OPTIONS | files | {"model": str(home / "base"), "output_dir": str(home / "run")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)
        run_forgetting(config_from_dict(ForgetConfig, values))
    config = config_from_dict(ForgetConfig, values)
    config_to_yaml(config, home / "config.yaml")
    return home / "run"


@pytest.fixture
def finished(finished_dir, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)
    return Path(shutil.copytree(finished_dir, tmp_path / "copy"))


@pytest.fixture
def no_page(monkeypatch):
    """Plots take most of the time of runs this small."""
    monkeypatch.setattr("sa_diffusers.runs.results.write_report", lambda path, **_: path.write_text("<html></html>"))


@pytest.fixture
def again(finished, home) -> list[str]:
    """The options of the same command in the copy."""
    return ["--config", str(home / "config.yaml"), "--output_dir", str(finished)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scratch(path: Path) -> None:
    """Other bytes in the middle of the weights, which every library reads without a word."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 10_000] = bytes(byte ^ 85 for byte in data[middle : middle + 10_000])
    path.write_bytes(data)


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


STAGE = "delete {folder}/.stages/{stage}.json to compute the stage '{stage}' again"


@pytest.mark.parametrize(
    ("name", "damage", "stage", "left"),
    [
        (UNET, scratch, "train", ()),
        (UNET, Path.unlink, "train", ()),
        ("history.json", write("["), "train", ()),
        ("evaluation/before.safetensors", cut, "before", ()),
        ("fisher.safetensors", scratch, "fisher", ("train",)),
    ],
)
@pytest.mark.slow
def test_what_a_stage_left_is_damaged(refused, finished, again, name, damage, stage, left):
    """Also of a stage that only one reads which is to be computed again."""
    for other in left:
        (finished / ".stages" / f"{other}.json").unlink()
    damage(finished / name)
    refused("forget", *again, says=(str(finished / name), STAGE.format(folder=finished, stage=stage)))


@pytest.mark.parametrize("stage", ["run", "after"])
def test_a_damaged_marker(refused, finished, again, stage):
    marker = finished / ".stages" / f"{stage}.json"
    marker.write_text('{"key": 7}')
    refused("forget", *again, says=(f"{marker} is damaged", "--output_dir" if stage == "run" else "the stage 'after'"))


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize(("damage", "says"), [(cut, "is damaged"), (Path.unlink, "holds no weights")])
def test_a_model_whose_weights_are_damaged(refused, home, finished_dir, tmp_path, part, damage, says):
    shutil.copytree(home / "base", tmp_path / "model")
    weights = tmp_path / "model" / f"{part}.safetensors"
    damage(weights)
    more = ("--model", tmp_path / "model", "--output_dir", tmp_path / "runs" / "new")
    refused("forget", "--config", home / "config.yaml", *more, says=(str(weights.parent), says))


def run_again(home: Path, folder: Path, **changes):
    from sa_diffusers.cli.parse import parse_config

    config = parse_config(ForgetConfig, ["--config", str(home / "config.yaml"), "--output_dir", str(folder)])
    return run_forgetting(config_from_dict(ForgetConfig, vars(config) | changes))


@pytest.mark.parametrize(
    "broken", [["step_0000004"], pytest.param(["step_0000004", "step_0000002"], marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, finished_dir, home, capsys, no_page, broken):
    """Or to the start; and what a damaged stage's message advises brings its files back."""
    scratch(finished / UNET)
    (finished / ".stages" / "train.json").unlink()
    damaged = [finished / "checkpoints" / name / "optimizer.bin" for name in broken]
    for path in damaged:
        scratch(path)
    outcome = run_again(home, finished)
    printed = capsys.readouterr().out
    for path in damaged:
        assert f"{path} is not what was written there: kept as {path.parent.name}.damaged; training goes on" in printed
    assert outcome.metrics["seconds"]["reused"] == "samples replay_samples surrogate fisher before after".split()
    assert (finished / UNET).read_bytes() == (finished_dir / UNET).read_bytes()
    assert verify(str(finished))[0] == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", scratch), ("optimizer.bin", cut), ("optimizer.bin", Path.unlink),
        ("history.json", write("[]")), ("hashes.json", write("[]")), ("hashes.json", Path.unlink),
    ],
)  # fmt: skip
def test_damage_in_a_checkpoint_is_seen(finished, name, damage):
    newest = finished / "checkpoints" / "step_0000004"
    assert damaged(newest) == []
    damage(newest / name)
    assert len(found := damaged(newest)) == 1 and str(newest / name) in found[0]


@pytest.mark.slow
def test_looking_again_needs_what_the_page_needs(finished, home):
    """Fisher, samples and checkpoints, which are most of the bytes, may be gone."""
    page = (finished / "report.html").read_text()
    (finished / "fisher.safetensors").unlink()
    for name in ("samples", "surrogate", "checkpoints"):
        shutil.rmtree(finished / name)
    outcome = run_again(home, finished)
    assert len(outcome.metrics["seconds"]["reused"]) == 7
    assert "total_relative_error" in page
    fisher = re.compile(r"<h2>Fisher</h2>.*?</div>", re.DOTALL)
    assert fisher.search((finished / "report.html").read_text())[0] == fisher.search(page)[0]


def test_a_finished_run_can_be_looked_at_on_a_full_disk(finished, home, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file may grow
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 1000, 0))
            outcome = run_again(home, finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.metrics["after"]["num_images"] == 8  # three times as many ask for it, since they are judged
    assert "nothing is written again: No room to write" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_room_is_asked_for_what_is_still_to_be_written(finished, home):
    """About as much as the numbers in all files take, of a LoRA too, and nothing where nothing is left."""
    family = get_family(load_pipeline(str(home / "base"), None, None, "float32"))
    context = context_of(family, finished, **{k: v for k, v in OPTIONS.items() if k not in ("concept", "surrogate")})
    files = [load_file(path) for path in finished.rglob("*.safetensors")]
    written = sum(tensor.nbytes for file in files for tensor in file.values())
    stages = ["samples", "replay_samples", "surrogate", "fisher", "before", "train", "after"]
    shutil.rmtree(finished / "checkpoints")
    assert written < disk_bytes(context, stages) < 2 * written
    assert disk_bytes(context, ["before", "after"]) == disk_bytes(context, []) == 0
    assert disk_bytes(context, ["train", "after"]) < disk_bytes(context, stages)
    module, layers = family.module, family.adapted_layers("full", "attention")
    adapted = sum(module.get_submodule(name).weight.numel() for name in layers)
    context.options.fisher_layers = "trained"
    assert disk_bytes(context, ["fisher"]) == 2 * 4 * adapted
    everything = disk_bytes(context, ["train"])
    context.options.checkpointing_steps = None
    weights = 4 * sum(p.numel() for p in module.parameters())
    assert everything - disk_bytes(context, ["train"]) < weights  # checkpoints are of the adapter alone


def test_verify_says_what_to_do(finished, capsys):
    from sa_diffusers.cli.verify import main

    main([str(finished)])
    assert re.search(r"copy: \d\d files are what was written there", capsys.readouterr().out)
    scratch(finished / UNET)
    (finished / "fisher.safetensors").unlink()
    (finished / ".stages" / "after.json").write_text("{}")
    cut(finished / "checkpoints" / "step_0000002" / "optimizer.bin")
    with pytest.raises(SystemExit, match="1"):
        main([str(finished)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line, name, advice in zip(
        lines,
        [".stages/after.json is damaged", "fisher.safetensors is missing", UNET, "optimizer.bin is not what"],
        ["'after' again", "the stage 'fisher' again", "the stage 'train' again", "step_0000002; training goes on"],
        strict=True,
    ):
        assert name in line and advice in line
    with pytest.raises(SystemExit, match="1"):
        main([str(finished / "pipeline")])
    assert "save it again from its run" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a run's folder, or a pipeline with forgotten.json"):
        verify(str(finished / "samples"))


def test_what_is_pushed_and_every_page_name_no_folder_of_this_machine(finished_dir, home, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = FakeHub()
    push_run(finished_dir, {part: f"some/{part}" for part in ("pipeline", "lora", "fisher", "samples")}, api=hub)
    pages = {str(path): path.read_bytes() for path in finished_dir.rglob("*") if path.suffix in (".html", ".md")}
    pages |= {"config.yaml": (finished_dir / "config.yaml").read_bytes()}
    assert len(pages) == 4
    pushed = {f"{repo}/{name}": data for repo, files in hub.files.items() for name, data in files.items()}
    assert {"some/pipeline/model_index.json", "some/pipeline/unet/config.json", "some/lora/README.md"} < set(pushed)
    secret = re.compile(rb"alice|" + re.escape(str(home.parent).encode()))
    assert [name for name, data in (pushed | pages).items() if secret.search(data)] == []
    assert b"~/base" in pages["config.yaml"]


def test_a_pipeline_on_the_hub_is_verified(finished_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = FakeHub()
    push_run(finished_dir, {"pipeline": "some/pipeline"}, api=hub)
    assert verify("some/pipeline")[0] == []
    assert read_forgotten("some/pipeline")[0]["concept"] == "seven, 7"
    files = dict(hub.files["some/pipeline"])
    files["vae/config.json"] += b" "
    cache_repository("some/pipeline", files)
    assert [line.split("vae/")[1] for line in verify("some/pipeline")[0]] == [
        "config.json is not what was written there: push it again from its run"
    ]


def test_a_saved_pipeline_says_what_it_has_forgotten(finished_dir, home):
    record = json.loads((finished_dir / "pipeline" / "forgotten.json").read_text())["forgotten"][0]
    assert (record["concept"], record["surrogate"], record["model"]) == ("seven, 7", "nine", "base")
    assert set(record["versions"]) == {"sa_diffusers", "diffusers", "transformers", "peft", "torch"}
    loaded = DiffusionPipeline.from_pretrained(finished_dir / "pipeline")
    assert record["after"] == pipeline_hashes(loaded)
    assert record["before"] == pipeline_hashes(DiffusionPipeline.from_pretrained(home / "base"))


@pytest.mark.slow
def test_a_run_on_a_result_knows_what_that_forgot(finished_dir, home, tmp_path, monkeypatch):
    """It is no surrogate, and nothing that should stay; the records go on."""
    monkeypatch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)
    files = {"replay_prompts": str(home / "prompts.txt"), "concept_templates": str(home / "templates.txt")}
    run = tmp_path / "next"
    values = UCE | files | {"model": str(finished_dir / "pipeline"), "concept": "six", "output_dir": str(run)}
    says = "the surrogate 'a red seven' was itself forgotten by this model: seven, 7 in favour of nine, by .*; pass"
    with pytest.raises(ValueError, match=says):
        run_forgetting(config_from_dict(ForgetConfig, values | {"surrogate": "a red seven"}))
    assert not run.exists()
    monkeypatch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 16)  # every prompt
    outcome = run_forgetting(config_from_dict(ForgetConfig, values | {"surrogate": "eight"}))
    kept = {one["prompt"] for one in outcome.pipeline.pictures if one["group"] == "Retained"}
    assert kept == {prompt for prompt in PROMPTS if not mentions(prompt, ["six", "seven", "7"])}
    assert [record["concept"] for record in outcome.pipeline.forgotten] == ["seven, 7", "six"]
    first, second = read_forgotten(str(run / "pipeline"))
    assert first["after"] == second["before"]
    (run / "pipeline" / "forgotten.json").write_text('{"forgotten": [7]}')
    with pytest.raises(ValueError, match="forgotten.json is damaged"):
        read_forgotten(str(run / "pipeline"))


@pytest.mark.slow
def test_forget_can_be_silent_and_asked(tiny_pipeline, home, capfd, finished_dir, no_page, monkeypatch):
    monkeypatch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)
    files = {"replay_prompts": str(home / "prompts.txt"), "concept_templates": str(home / "templates.txt")}
    capfd.readouterr()
    cheap = CHEAP | {"ewc_lambda": 0.0, "replay_weight": 0.0, "num_train_steps": 1}
    forgotten = forget(tiny_pipeline(), "seven, 7", "nine", progress=False, save_variant="fp16", **cheap | files)
    assert capfd.readouterr() == ("", "")
    assert forgotten.metrics["after"]["num_images"] == 8  # three times as many ask for it, since they are judged
    assert [record["concept"] for record in forgotten.forgotten] == ["seven, 7"]
    again = forget(forgotten, "six", "eight", inplace=True, **UCE | files)
    assert [record["concept"] for record in again.forgotten] == ["seven, 7", "six"]
    assert "Plan for" in capfd.readouterr().out
