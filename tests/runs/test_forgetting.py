"""A whole run on a pipeline of random weights: what it leaves, reuses, refuses, and how it goes on after a stop."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cheap_runs import PROMPTS, interrupt_call
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import sa_diffusers.runs.forget
import sa_diffusers.runs.stages.fisher
import sa_diffusers.runs.stages.train
from sa_diffusers.core.concepts import Concepts, mentions
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.fisher import Fisher, FisherMismatch
from sa_diffusers.core.objectives import ElasticWeightConsolidation, SelectiveAmnesia
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.replay import negative_requests, select_replay
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import SamplingSettings, draw_samples
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.families import get_family
from sa_diffusers.families.base import select_parameters
from sa_diffusers.families.scopes import SCOPES
from sa_diffusers.families.text_to_image.family import TextToImageFamily
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.atomic_files import DiskFull
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs.forget import Outcome, forget, run_forgetting
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig


RUN_OF_0_1 = Path(__file__).parents[1] / "golden" / "run_of_0_1"
STAGES = ["samples", "replay_samples", "surrogate", "fisher", "before", "train", "after"]
CHEAP = {
    "num_samples": 8, "num_surrogate_samples": 4, "num_inference_steps": 2, "sample_batch_size": 4,
    "guidance_scale": 2.0, "replay_guidance_scale": 2.0, "fisher_samples": 3, "fisher_terms": "3",
    "num_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-3, "lr_warmup_steps": 0, "ewc_lambda": 1.0,
    "checkpointing_steps": None, "logging_steps": 1, "ema_decay": 0.5, "eval_batch_size": 16,
}  # fmt: skip
CHECKPOINTS = {"checkpointing_steps": 2}
QUICK = {"ewc_lambda": 0.0, "replay_weight": 0.0}  # neither Fisher nor samples, where these are not the matter


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)
        yield


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Plots take most of the time of runs this small; `finished_dir` has the real page."""
    monkeypatch.setattr("sa_diffusers.runs.results.write_report", lambda path, **_: path.write_text("<html></html>"))


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "replay.txt").write_text("\n".join(PROMPTS))
    (folder / "templates.txt").write_text("a {}\na red {}\na green {} on black")
    return {"replay_prompts": str(folder / "replay.txt"), "concept_templates": str(folder / "templates.txt")}


@pytest.fixture
def options(prompt_files) -> dict:
    return CHEAP | prompt_files


@pytest.fixture
def start(tiny_pipeline_dir, options):
    """Run in a folder, from the saved pipeline, with some options changed."""

    def run(output_dir: Path, **changes) -> Outcome:
        values = {"concept": "seven, 7", "model": str(tiny_pipeline_dir), "output_dir": str(output_dir)}
        return run_forgetting(config_from_dict(ForgetConfig, options | values | changes))

    return run


@pytest.fixture(scope="module")
def finished_dir(few_pictures, tiny_pipeline_dir, prompt_files, tmp_path_factory) -> Path:
    """One finished run; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = {"concept": "seven, 7", "model": str(tiny_pipeline_dir), "output_dir": str(folder)} | CHECKPOINTS
    run_forgetting(config_from_dict(ForgetConfig, CHEAP | prompt_files | values))
    return folder


@pytest.fixture
def finished(finished_dir, tmp_path) -> Path:
    return Path(shutil.copytree(finished_dir, tmp_path / "finished"))


@pytest.fixture
def shared(finished) -> dict[str, str]:
    """Options that take samples and Fisher from the finished run."""
    return {"samples": str(finished / "samples"), "fisher": str(finished / "fisher.safetensors")}


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name, but for the note of who runs here."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(first: dict, second: dict) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_near(first: dict, second: dict) -> None:
    """Of runs that reused other stages, and so encoded prompts in other batches; a step moves weights by 1e-3."""
    largest = max(value.abs().max().item() for value in second.values())
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * largest)


def picture(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipeline("a red seven", num_inference_steps=3, generator=generator, output_type="np").images
    )


def test_what_a_run_leaves(finished):
    for name in (
        "pipeline/model_index.json", "pipeline/README.md", "fisher.safetensors", "samples/samples.safetensors",
        "samples/samples.png", "samples/without_concept.safetensors", "surrogate/surrogate.safetensors",
        "surrogate/surrogate.png", "checkpoints/step_0000004", "config.yaml", "before_after.png", "report.html",
        "metrics.json", "history.json",
    ):  # fmt: skip
        assert (finished / name).exists(), name
    assert {path.stem for path in (finished / ".stages").iterdir()} == {"run", *STAGES}
    leftovers = [p.name for p in finished.rglob(".*") if p.name not in (".lock", ".stages")]
    assert leftovers == []


def test_the_samples_are_what_the_method_asks_for(finished):
    samples = SampleSet.load(finished / "samples" / "samples.safetensors")
    assert len(samples) == 8
    assert set(texts(samples.conditions)) <= {"", *PROMPTS}
    surrogate = SampleSet.load(finished / "surrogate" / "surrogate.safetensors")
    assert all("seven" in prompt or "7" in prompt for prompt in texts(surrogate.conditions))
    drawn_anew = SampleSet.load(finished / "samples" / "without_concept.safetensors").conditions
    assert drawn_anew == [asked for asked in samples.conditions if asked.text in ("", "a digit")]
    fisher = Fisher.load(finished / "fisher.safetensors")
    assert fisher.metadata["num_samples"] == 3
    assert fisher.metadata["num_evaluations"] == 18
    assert set(fisher.tensors) == set(unet_of(finished))


def test_open_prompts_are_drawn_with_the_concept_as_negative_prompt(finished, tiny_pipeline_dir):
    drawn = SampleSet.load(finished / "samples" / "without_concept.safetensors")
    samples = SampleSet.load(finished / "samples" / "samples.safetensors")
    requests = negative_requests(samples, Concepts([find_concept("seven, 7", None)]), "open", seed=0)
    assert {request.negative for request in requests} == {Condition("seven, 7")}
    family = get_family(load_pipeline(str(tiny_pipeline_dir), None, None, "float32"))
    again = draw_samples(family, requests, SamplingSettings(1.5, 2, 4))
    assert again.conditions == drawn.conditions
    torch.testing.assert_close(again.latents, drawn.latents, rtol=1e-4, atol=1e-5)  # texts in other batches


@pytest.mark.slow
def test_what_training_sees(start, finished, tiny_pipeline_dir, monkeypatch):
    """Surrogate pictures under captions of the concept; replay of everything but the concept, the empty prompt too."""
    seen, draw = [], SelectiveAmnesia.draw
    monkeypatch.setattr(
        SelectiveAmnesia, "draw", lambda self, batch, rng: seen.append(batch) or draw(self, batch, rng)
    )
    start(finished, num_train_steps=8, replay_target="noise", overwrite=True)
    family = get_family(load_pipeline(str(tiny_pipeline_dir), None, None, "float32"))
    samples, drawn_anew, surrogate = (
        SampleSet.load(finished / f"{name}.safetensors")
        for name in ("samples/samples", "samples/without_concept", "surrogate/surrogate")
    )
    concept = find_concept("seven, 7", None)
    for name, allowed in (
        ("surrogate", surrogate),
        ("replayed", select_replay(samples, Concepts([concept]), "open") + drawn_anew),
    ):
        expected = family.batch(allowed.latents, allowed.conditions)
        used = set()
        for batch in seen:
            for latent, text in zip(batch[name]["sample"], batch[name]["encoder_hidden_states"], strict=True):
                index = next(i for i, known in enumerate(expected["sample"]) if known.equal(latent))
                torch.testing.assert_close(text, expected["encoder_hidden_states"][index])
                used.add(index)
        assert used == set(range(len(allowed)))
        said = texts(allowed.conditions)
        assert all(mentions(prompt, concept.phrasings) is (name == "surrogate") for prompt in said)


def test_metrics(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["concept"] == "seven, 7"
    assert metrics["surrogate"] == "three"
    asked = {
        "concept_probability", "concept_entropy", "retained_accuracy", "retained_worst_accuracy", "attribute_accuracy",
        "concept_probability_unseen", "concept_rate_when_unnamed", "noise_probability", "classifier_accuracy",
        "num_images",
    }  # fmt: skip
    for side in ("before", "after"):
        assert asked <= set(metrics[side])
        assert metrics[side]["concept_probability"] is None  # nobody could judge
        assert metrics[side]["num_images"] == 8  # three times as many ask for it, since they are judged
        assert metrics[side]["replay_loss"] > 0
    assert metrics["before"]["replay_loss"] != metrics["after"]["replay_loss"]
    seconds = metrics["seconds"]
    assert seconds.pop("reused") == []
    total = seconds.pop("total")
    assert set(seconds) == {"sample", "surrogate", "fisher", "train", "evaluate"} == set(metrics["amounts"])
    for name, work in metrics["amounts"].items():
        assert work["per_second"] == pytest.approx(work["count"] / seconds[name], abs=0.01) or not seconds[name]
    assert metrics["amounts"]["evaluate"]["count"] == 2 * metrics["after"]["num_images"]
    assert total == pytest.approx(sum(seconds.values()), abs=0.01)


def test_the_same_run_again_computes_nothing_and_stock_diffusers_loads_the_result(
    finished, start, capsys, monkeypatch
):
    """And it draws what the returned pipeline draws, which is not what the base model draws."""
    before = json.loads((finished / "metrics.json").read_text())
    for owner, name in (
        (TextToImageFamily, "draw"),
        (TextToImageFamily, "encode"),
        (sa_diffusers.runs.stages.fisher, "estimate_fisher"),
        (sa_diffusers.runs.stages.train, "train"),
    ):
        monkeypatch.setattr(owner, name, None)  # calling it would raise
    outcome = start(finished)
    outcome.say()
    assert f"--compare {finished} --concept 'seven, 7'" in capsys.readouterr().out  # the evaluation, ready to be run
    assert outcome.metrics["seconds"].pop("reused") == STAGES
    assert before["seconds"].pop("reused") == []
    assert outcome.metrics == before
    assert_same(dict(outcome.pipeline.unet.state_dict()), unet_of(finished))

    loaded = DiffusionPipeline.from_pretrained(finished / "pipeline")
    assert type(loaded) is StableDiffusionPipeline
    assert type(loaded.scheduler) is type(outcome.pipeline.scheduler)
    torch.testing.assert_close(picture(loaded), picture(outcome.pipeline), rtol=0, atol=0)
    base = StableDiffusionPipeline.from_pretrained(outcome.pipeline.config._name_or_path)
    assert (picture(loaded) - picture(base)).abs().max() > 1e-3
    assert_same(loaded.vae.state_dict(), base.vae.state_dict())
    assert_same(loaded.text_encoder.state_dict(), base.text_encoder.state_dict())


@pytest.mark.slow
def test_equal_runs_in_two_folders_are_equal_whatever_torch_has_drawn(finished, start, tmp_path):
    torch.manual_seed(1)
    start(tmp_path / "other")
    assert_same(unet_of(tmp_path / "other"), unet_of(finished))


def test_another_configuration_in_the_folder_is_refused(finished, start, monkeypatch):
    """By the stage that it would change, before anything is drawn."""
    kept = contents(finished)
    monkeypatch.setattr(TextToImageFamily, "draw", None)  # calling it would raise
    with pytest.raises(StageMismatch) as error:
        start(finished, learning_rate=2e-3, train_scope="xattn")
    assert "learning_rate: 0.001 -> 0.002" in str(error.value)
    assert 'train_scope: "full" -> "xattn"' in str(error.value)
    assert "--overwrite" in str(error.value)
    assert "seed" not in str(error.value)
    with pytest.raises(StageMismatch, match="fisher_terms"):
        start(finished, fisher_terms="2")
    assert contents(finished) == kept


def test_a_run_of_version_0_1_is_refused_and_loses_nothing(start, tmp_path):
    run = shutil.copytree(RUN_OF_0_1, tmp_path / "run")
    for overwrite in (False, True):
        with pytest.raises(StageMismatch, match="older version.* pass another --output_dir"):
            start(run, overwrite=overwrite)
    assert contents(run) == contents(RUN_OF_0_1)


@pytest.mark.slow
def test_overwrite_reuses_what_still_fits(finished, start, shared, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        shown = []
        patch.setattr("sa_diffusers.runs.results.write_report", lambda path, **content: shown.append(content))
        outcome = start(finished, learning_rate=2e-3, overwrite=True)
    assert shown[0]["seconds"]["reused"] == ["sample", "surrogate", "fisher"]  # not "evaluate": half of it is new
    assert outcome.metrics["seconds"]["reused"] == [
        "samples",
        "replay_samples",
        "surrogate",
        "fisher",
        "before",
    ]
    start(tmp_path / "fresh", learning_rate=2e-3, **shared)
    assert_near(unet_of(finished), unet_of(tmp_path / "fresh"))


@pytest.mark.slow
def test_options_that_do_not_matter_may_change_and_float16_files_be_asked_for_afterwards(finished, start):
    kept = unet_of(finished)
    changed = {"checkpoints_total_limit": 1, "fisher_chunk_size": 2, "track_images": 4, "logging_steps": 3}
    assert start(finished, save_variant="fp16", **changed).metrics["seconds"]["reused"] == STAGES
    assert_same(unet_of(finished), kept)
    half = StableDiffusionPipeline.from_pretrained(finished / "pipeline", variant="fp16", dtype=torch.float16)
    expected = {name: value.half() for name, value in unet_of(finished).items()}
    assert_same(dict(half.unet.state_dict()), expected)
    for part in ("unet", "vae"):
        assert (finished / "pipeline" / part / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert (finished / "pipeline" / "text_encoder" / "model.fp16.safetensors").exists()


@pytest.mark.slow
def test_overwrite_starts_again_what_another_configuration_left_unfinished(finished, start, tmp_path, monkeypatch):
    """In a relative folder too, as runs/<concept> is by default."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_call(patch, TextToImageFamily, "draw", 1)
        start(Path("run"))
    start(Path("run"), seed=1, overwrite=True)
    start(Path("fresh"), seed=1)
    assert_same(unet_of(Path("run")), unet_of(Path("fresh")))
    assert not unet_of(Path("run"))["conv_in.weight"].equal(unet_of(finished)["conv_in.weight"])


@pytest.mark.slow
def test_overwrite_after_the_inputs_changed_trains_from_the_start(start, tmp_path):
    """The configuration is the same, the prompts in the file are not: the checkpoints are of another training."""
    prompts = tmp_path / "replay.txt"
    prompts.write_text("\n".join(PROMPTS))
    run, given = tmp_path / "run", {"replay_prompts": str(prompts), "ewc_lambda": 0.0, "surrogate": "noise"}
    start(run, **given)
    prompts.write_text("a blue six\na blue eight\na blue nine\nzero")
    with pytest.raises(StageMismatch, match="prompts"):
        start(run, **given)
    start(run, overwrite=True, **given)
    start(tmp_path / "fresh", **given)
    assert_same(unet_of(run), unet_of(tmp_path / "fresh"))


@pytest.mark.slow
def test_overwrite_looks_anew_at_another_concept(start, tmp_path):
    """Though the model before forgetting is the same, and nothing is replayed."""
    seven = {"method": "finetune", "ewc_lambda": None, "surrogate": "noise"}
    start(tmp_path / "run", **seven)
    again = start(tmp_path / "run", **seven | {"concept": "nine"}, overwrite=True)
    assert again.metrics["seconds"]["reused"] == []
    found = (Findings.load(tmp_path / n / "evaluation" / "before.safetensors") for n in ("run", "fresh"))
    start(tmp_path / "fresh", **seven | {"concept": "nine"})
    torch.testing.assert_close(*(findings.pictures for findings in found), rtol=0, atol=1)


def test_a_folder_with_files_of_something_else_is_refused(start, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StageMismatch, match="holds files of something else"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


@pytest.mark.slow
def test_samples_and_fisher_are_shared_by_path_and_may_move(finished, start, shared, tmp_path):
    start(tmp_path / "sharing", **shared)
    assert_near(unet_of(tmp_path / "sharing"), unet_of(finished))
    assert not (tmp_path / "sharing" / "fisher.safetensors").exists()
    assert not (tmp_path / "sharing" / "samples" / "samples.safetensors").exists()
    shared["samples"] = str((finished / "samples").rename(tmp_path / "elsewhere"))
    assert start(tmp_path / "sharing", **shared).metrics["seconds"]["reused"] == STAGES


@pytest.mark.slow
def test_samples_and_fisher_serve_another_concept(start, shared, tmp_path):
    other = start(tmp_path / "nine", concept="nine", surrogate="six", **shared)
    assert other.metrics["concept"] == "nine"


@pytest.mark.slow
def test_samples_and_fisher_of_another_model_are_refused(finished, start, tiny_pipeline, tmp_path):
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    other = {"model": str(tmp_path / "other")}
    with pytest.raises(
        ValueError, match="drawn by another model.* text_encoder: expected .*; unet: expected .*, got .*; vae: "
    ):
        start(tmp_path / "1", samples=str(finished / "samples"), **other)
    with pytest.raises(FisherMismatch, match="model_hash: the Fisher has .* omit --fisher"):
        start(tmp_path / "2", fisher=str(finished / "fisher.safetensors"), **other)
    with pytest.raises(ValueError, match="no samples in"):
        start(tmp_path / "3", samples=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Fisher at"):
        start(tmp_path / "4", fisher=str(tmp_path / "absent.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True])
def test_interrupted_in_every_stage_and_run_again(finished, start, tmp_path, monkeypatch, every):
    """In one after the other, each amid its work; training goes on from its last checkpoint."""
    draw, train = TextToImageFamily, sa_diffusers.runs.stages.train
    step = (ElasticWeightConsolidation, "add_gradient")
    interruptions = [
        ([(draw, "draw", 1)], "samples"),
        ([(draw, "draw", 1)], "replay_samples"),  # the first call draws what is left of the samples
        ([(draw, "draw", 1)], "surrogate"),
        ([(sa_diffusers.runs.stages.fisher, "estimate_fisher", 2)], "fisher"),
        ([(draw, "draw", 1)], "before"),
        ([(*step, 3)], "train"),
        ([(*step, 2), (train, "save_pipeline", 0)], "train"),  # the last two of four steps are left, no third one
        ([(draw, "draw", 1)], "after"),
        ([(sa_diffusers.runs.forget, "write_results", 0)], None),
    ]
    run = tmp_path / "run"
    for calls, unfinished in interruptions if every else (interruptions[0], interruptions[5]):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
            for owner, name, number in calls:
                interrupt_call(patch, owner, name, number)
            start(run, **CHECKPOINTS)
        assert stop.value.args == (calls[-1][1],)
        done = STAGES[: STAGES.index(unfinished)] if unfinished else STAGES
        assert {path.stem for path in (run / ".stages").iterdir()} == {"run", *done}
    outcome = start(run, **CHECKPOINTS)
    assert outcome.metrics["seconds"]["reused"] == done
    assert_near(unet_of(run), unet_of(finished))
    for file in ("fisher", "samples/samples", "surrogate/surrogate", "samples/without_concept"):
        assert_near(*(load_file(folder / f"{file}.safetensors") for folder in (run, finished)))
    for side in ("before", "after"):
        expected = json.loads((finished / "metrics.json").read_text())[side]
        expected = {name: value and pytest.approx(value, rel=1e-4) for name, value in expected.items()}
        assert outcome.metrics[side] == expected


@pytest.mark.slow
def test_a_scope_changes_its_parameters_only(start, shared, tmp_path):
    outcome = start(tmp_path / "run", train_scope="xattn", surrogate="noise", **shared)
    base = load_pipeline(str(outcome.pipeline.config._name_or_path), None, None, "float32").unet
    inside = select_parameters(base, "xattn", SCOPES)
    changed = {name for name, p in outcome.pipeline.unet.named_parameters() if not p.equal(base.get_parameter(name))}
    assert changed <= set(inside)
    assert len(changed) > 0.8 * len(inside)  # some gradients are zero by construction, as that of a key's bias
    assert SampleSet.load(tmp_path / "run" / "surrogate" / "surrogate.safetensors").latents.shape == (4, 4, 8, 8)


@pytest.mark.slow
def test_a_surrogate_folder_and_a_change_of_its_pictures(start, finished, shared, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "blue", "white")):
        Image.new("RGB", (20, 16), colour).save(folder / f"{index}.png")
    start(tmp_path / "run", surrogate=str(folder), **shared)
    assert SampleSet.load(tmp_path / "run" / "surrogate" / "surrogate.safetensors").latents.shape == (4, 4, 8, 8)
    assert not unet_of(tmp_path / "run")["conv_in.weight"].equal(unet_of(finished)["conv_in.weight"])
    Image.new("RGB", (20, 16), "green").save(folder / "0.png")
    with pytest.raises(StageMismatch, match="surrogate"):
        start(tmp_path / "run", surrogate=str(folder), **shared)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no image in"), ("grey", "is a grey image"), ("broken", "is no readable image")],
)
def test_unusable_surrogate_folders_are_refused_before_anything_is_loaded(tmp_path, options, content, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if content == "grey":
        Image.new("L", (16, 16)).save(folder / "0.png")
    if content == "broken":
        (folder / "0.png").write_bytes(b"\x89PNG but no more")
    config = config_from_dict(
        ForgetConfig, options | {"concept": "seven", "surrogate": str(folder), "model": "absent"}
    )
    with pytest.raises(ValueError, match=message):
        run_forgetting(config)


def test_read_inputs(options):
    config = config_from_dict(ForgetConfig, options | {"concept": "digit", "surrogate": "very " * 60 + "long prompt"})
    assert len(read_inputs(config).concepts[0].surrogate) > 300
    everything = options | {"concept": "a", "surrogate": "nothing"}
    with pytest.raises(ValueError, match="every prompt of .* mentions 'a'.*pass other --replay_prompts"):
        read_inputs(config_from_dict(ForgetConfig, everything))


def test_what_is_shown_as_kept_does_not_name_the_concept(options):
    config = config_from_dict(ForgetConfig, options | {"concept": "seven, 7", "surrogate": "nine"})
    inputs = read_inputs(config)
    assert any(map(inputs.concepts.named_in, inputs.prompts)) and len(inputs.sets["retained"])
    assert not any(map(inputs.concepts.named_in, inputs.sets["retained"].prompts))


@pytest.mark.slow
def test_forget_returns_a_new_pipeline(tiny_pipeline, options):
    pipeline = tiny_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    forgotten = forget(pipeline, "seven", "noise", **options | QUICK)
    assert type(forgotten) is StableDiffusionPipeline
    assert_same(pipeline.unet.state_dict(), before)
    assert not forgotten.unet.state_dict()["conv_in.weight"].equal(before["conv_in.weight"])
    assert forgotten.vae is pipeline.vae
    assert picture(forgotten).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_forget_in_place_without_fisher_or_replay(tiny_pipeline, options, tmp_path):
    pipeline = tiny_pipeline()
    unet, before, run = pipeline.unet, pipeline.unet.conv_in.weight.detach().clone(), tmp_path / "run"
    assert forget(pipeline, "seven", "noise", inplace=True, output_dir=run, **options | QUICK) is pipeline
    assert pipeline.unet is unet
    assert not unet.conv_in.weight.equal(before)
    assert_same(dict(unet.state_dict()), unet_of(run))
    assert {path.stem for path in (run / ".stages").iterdir()} == {"run", "surrogate", "before", "train", "after"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["seconds"]["reused"] == [] and "replay_loss" not in metrics["after"]


@pytest.mark.slow
def test_forget_that_fails_leaves_the_pipeline_as_it_was(tiny_pipeline, options, monkeypatch):
    pipeline = tiny_pipeline()
    before = pipeline.unet.conv_in.weight.detach().clone()
    monkeypatch.setattr(sa_diffusers.runs.forget, "write_results", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forget(pipeline, "seven", "noise", inplace=True, **options | QUICK)
    torch.testing.assert_close(pipeline.unet.conv_in.weight.detach(), before, rtol=0, atol=0)


def test_what_was_prepared_is_undone_after_an_error(tiny_pipeline, options, tmp_path, monkeypatch):
    pipeline = tiny_pipeline().to(torch.bfloat16)
    monkeypatch.setattr(sa_diffusers.runs.forget, "announce", lambda *_: 1 / 0)
    fast = {"compile_backend": "eager", "channels_last": True, "dtype": "bfloat16"}
    values = {"concept": "seven", "surrogate": "noise", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ZeroDivisionError):
        run_forgetting(config_from_dict(ForgetConfig, options | values | fast), pipeline)
    assert pipeline.unet._compiled_call_impl is None
    assert {weight.dtype for weight in pipeline.unet.parameters()} == {torch.bfloat16}
    assert all(weight.is_contiguous() for weight in pipeline.unet.parameters())


def test_forget_refuses_unknown_options(tiny_pipeline, options):
    with pytest.raises(ValueError, match="unknown option 'steps'"):
        forget(tiny_pipeline(), "seven", steps=3)


@pytest.mark.slow
def test_the_safety_checker_is_not_run_and_saved_back_unchanged(tiny_pipeline, safety_checker, options, tmp_path):
    from transformers import CLIPImageProcessor

    pipeline = tiny_pipeline(safety_checker=safety_checker, feature_extractor=CLIPImageProcessor())
    forgotten = forget(pipeline, "seven", "noise", output_dir=tmp_path / "run", **options | QUICK)
    assert forgotten.safety_checker is safety_checker
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert loaded.config.requires_safety_checker
    assert_same(loaded.safety_checker.state_dict(), safety_checker.state_dict())


def test_no_room_on_the_disk_is_said_before_work_starts(start, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(DiskFull, match="needs .* GB, but its file system has 0.00 GB free"):
        start(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock", ".stages", "config.yaml"}


@pytest.mark.slow
def test_divergence_leaves_no_pipeline(start, shared, tmp_path):
    from sa_diffusers.training.loop import TrainingDiverged

    with pytest.raises(TrainingDiverged, match="at step [1-4]"):
        start(tmp_path / "run", learning_rate=1e30, max_grad_norm=None, **shared)
    assert not (tmp_path / "run" / "pipeline").exists()


def test_the_saved_configuration_repeats_the_run(finished):
    from sa_diffusers.cli.parse import parse_config

    config = parse_config(ForgetConfig, ["--config", str(finished / "config.yaml")])
    assert config.concept == "seven, 7"
    assert {name: asdict(config)[name] for name in CHEAP} == CHEAP | CHECKPOINTS


@pytest.mark.slow
def test_a_run_that_failed_early_leaves_the_folder_to_its_correction(start, tmp_path):
    with pytest.raises(ModelLoadError):
        start(tmp_path / "run", model=str(tmp_path / "typo"))
    assert start(tmp_path / "run", **QUICK).metrics["concept"] == "seven, 7"


@pytest.mark.parametrize(
    "option",
    [{"learning_rate": float("nan")}, {"ewc_lambda": float("inf")}, {"track_steps": 0}, {"checkpointing_steps": -1},
     {"eval_images_class": -3}, {"adam_beta1": 2.0}, {"negative_guidance_scale": 1.0}, {"max_grad_norm": 0.0}],
)  # fmt: skip
def test_values_that_cannot_work_are_refused_at_once(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ForgetConfig(concept="seven", **option)


def test_mixed_precision_of_components_is_refused(tiny_pipeline):
    pipeline = tiny_pipeline()
    pipeline.text_encoder.half()
    with pytest.raises(ValueError, match="components of one precision"):
        forget(pipeline, "seven", "nine")
