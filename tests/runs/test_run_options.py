"""Options of a run, and what may go wrong in it: trackers, early stop, averages, pushes, NaN, no room."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from cheap_runs import PROMPTS
from diffusers import StableDiffusionPipeline
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from safetensors.torch import load_file

import sa_diffusers.runs.stages.train
from sa_diffusers.core.fisher import Fisher, FisherMismatch
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.evaluation.forgetting import Findings, replay_loss
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.families import get_family
from sa_diffusers.families.text_to_image.family import TextToImageFamily
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.hub import PushError
from sa_diffusers.runs.forget import Outcome
from sa_diffusers.runs.plan import NotEnoughMemory


NAN = float("nan")
DIGITS, INKS = ["six", "seven", "eight", "nine"], ["red", "green"]
OWN = {"learning_rate": 1e-3, "eval_images_concept": 4, "eval_images_class": 2, "eval_images_other": 4}
pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(scope="module")
def start(run_cheaply) -> Callable[..., Outcome]:
    """Run in a folder, from the saved pipeline, with some options changed."""
    return partial(run_cheaply, **OWN)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> Path:
    """A finished run; do not write into it."""
    return start(tmp_path_factory.mktemp("finished") / "run").output_dir


@pytest.fixture(scope="module")
def shared(finished) -> dict[str, str]:
    """Options that take samples and Fisher from the finished run."""
    return {"samples": str(finished / "samples"), "fisher": str(finished / "fisher.safetensors")}


@pytest.fixture(scope="module")
def make_judge(tmp_path_factory):
    """Options of an evaluation by untrained classifiers of the given digits, which all have the same weights."""
    folder = tmp_path_factory.mktemp("judge")
    rows = [{"prompt": p, "form": f} for p in PROMPTS for f in ("seen", "held_out")]
    for row in rows:
        words = row["prompt"].split()
        row |= {name: w for name, known in (("digit", DIGITS), ("ink", INKS)) for w in known if w in words}
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def make(*orders: list[str]) -> dict:
        names = []
        for digits in orders:
            torch.manual_seed(0)
            words = {"digit": {d: [d, "7"] if d == "seven" else [d] for d in digits}, "ink": {i: [i] for i in INKS}}
            judge = AttributeClassifier(
                {"digit": digits, "ink": INKS}, words, image_size=16, channels=(8, 8), num_features=12
            )
            order = [DIGITS.index(digit) for digit in digits]
            judge.heads["digit"].load_state_dict({k: v[order] for k, v in judge.heads["digit"].state_dict().items()})
            names.append(str(folder / "-".join(digits)))
            judge.save_pretrained(names[-1])
        return {"classifier": names, "eval_prompts": str(folder / "prompts.jsonl")}

    return make


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same(first: dict, second: dict) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_near(first: dict, second: dict) -> None:
    """Of runs that encoded prompts in other batches; a step moves weights by 1e-2."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def unwatched(start, shared, make_judge, tmp_path_factory) -> tuple[Outcome, list[int]]:
    """A run from the shared samples and Fisher, judged by two of the same mind, and the seeds of what it drew.

    The second knows the digits in another order.
    """
    with pytest.MonkeyPatch.context() as patch:
        drawn = note_seeds(patch)
        outcome = start(tmp_path_factory.mktemp("unwatched") / "run", **make_judge(DIGITS, DIGITS[::-1]), **shared)
    return outcome, drawn


def note_seeds(patch: pytest.MonkeyPatch) -> list[int]:
    """The seed of every picture that is drawn from now on."""
    drawn, draw = [], TextToImageFamily.draw

    def noted(self, prompts, seeds, *arguments, **options):
        drawn.extend(seeds)
        return draw(self, prompts, seeds, *arguments, **options)

    patch.setattr(TextToImageFamily, "draw", noted)
    return drawn


@pytest.mark.slow
def test_other_pictures_to_judge_by_are_refused_by_the_options_that_say_which(start, shared, make_judge, unwatched):
    folder, options = unwatched[0].output_dir, make_judge(DIGITS, DIGITS[::-1]) | shared
    with pytest.raises(StageMismatch, match=r"exam.exams.*\n  \(exam.exams: of eval_prompts, eval_images_concept"):
        start(folder, **options, eval_images_concept=5)
    with pytest.raises(StageMismatch) as error:
        start(folder, **options, guidance_scale=3.0)
    assert "guidance_scale" in str(error.value) and "eval_prompts" not in str(error.value)


@pytest.mark.slow
def test_pictures_while_training(start, shared, make_judge, unwatched, tmp_path, monkeypatch):
    """As many as it says, judged, from seeds of their own, or what ends a run early would be what it is judged by.

    What is watched is not changed by watching.
    """
    drawn = note_seeds(monkeypatch)
    outcome = start(tmp_path / "run", track_steps=2, track_images=4, **make_judge(DIGITS), **shared)
    sheets = sorted((tmp_path / "run" / "progress").iterdir())
    assert [path.name for path in sheets] == ["step_000002.png", "step_000004.png"]
    for path in sheets:
        assert Image.open(path).size == (8 * 32, 32)  # pictures of 16 pixels, enlarged
    first, last = (path.read_bytes() for path in sheets)
    assert first != last  # the model changed between the two
    for row in json.loads((tmp_path / "run" / "history.json").read_text()):
        assert ("concept_probability" in row) == (row["step"] % 2 == 0)
    plain, others = unwatched
    assert len(drawn) - len(others) == 2 * 4 and len(set(drawn) - set(others)) == 4  # the same at each look
    assert_near(outcome.pipeline.unet.state_dict(), unet_of(plain.output_dir))


@pytest.mark.slow
def test_tensorboard_gets_every_logged_number(start, shared, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(tmp_path / "run", report_to="tensorboard", **shared).output_dir
    (file,) = (run / "logs").rglob("events.out.tfevents.*.0")
    events = EventAccumulator(str(file)).Reload()
    for row in json.loads((run / "history.json").read_text()):
        step = row.pop("step")
        for name, value in row.items():
            assert events.Scalars(name)[step - 1].step == step
            assert events.Scalars(name)[step - 1].value == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_early_stop(start, shared, make_judge, two_steps, tmp_path, monkeypatch):
    """At the first look below nearly 1; a run that stopped and was then interrupted stays so.

    And not where the interval of what was seen does not tell: of 10 pictures in which a quarter is left.
    """
    options = {"track_steps": 2, "track_images": 4, "checkpointing_steps": 3} | make_judge(DIGITS) | shared
    never = start(tmp_path / "never", early_stop=0.4, **options | {"eval_images_concept": 11})
    history = json.loads((never.output_dir / "history.json").read_text())
    looks = [row for row in history if "concept_probability" in row]
    assert looks and all(row["concept_probability"] < 0.4 and not row.get("stopped") for row in looks)
    assert [row["step"] for row in json.loads((tmp_path / "never" / "history.json").read_text())] == [1, 2, 3, 4]

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sa_diffusers.runs.stages.train, "save_pipeline", lambda *_: 1 / 0)
        start(run, early_stop=0.99, **options)
    outcome = start(run, early_stop=0.99, **options)
    history = json.loads((run / "history.json").read_text())
    assert [row["step"] for row in history] == [1, 2]
    assert history[-1]["stopped"]
    assert_near(outcome.pipeline.unet.state_dict(), two_steps)
    assert not outcome.pipeline.unet.conv_in.weight.equal(never.pipeline.unet.conv_in.weight)
    assert "train" in start(run, early_stop=0.99, **options).metrics["seconds"]["reused"]


@pytest.fixture(scope="module")
def two_steps(start, shared, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights after two steps."""
    return unet_of(start(tmp_path_factory.mktemp("two") / "run", num_train_steps=2, **shared).output_dir)


@pytest.mark.slow
def test_what_is_saved_is_the_average(start, shared, two_steps, tmp_path):
    """Of two steps: 0.1 of the weights after the first, 0.9 of those after the second."""
    first, average = (
        unet_of(start(tmp_path / name, num_train_steps=steps, ema_decay=decay, **shared).output_dir)
        for name, steps, decay in (("first", 1, None), ("average", 2, 0.1))
    )
    second = two_steps
    expected = {name: 0.1 * first[name] + 0.9 * second[name] for name in first}
    torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
    assert (first["conv_in.weight"] - second["conv_in.weight"]).abs().mean() > 1e-4


@pytest.mark.slow
def test_gradient_checkpointing_and_unjudged_pictures_change_nothing(start, finished, shared, tmp_path):
    outcome = start(tmp_path / "run", gradient_checkpointing=True, track_steps=2, track_images=2, **shared)
    assert len(list((tmp_path / "run" / "progress").iterdir())) == 2
    assert "concept_probability" not in (tmp_path / "run" / "history.json").read_text()
    torch.testing.assert_close(unet_of(tmp_path / "run"), unet_of(finished), rtol=1e-4, atol=1e-6)
    assert not outcome.pipeline.unet.is_gradient_checkpointing


class WatchingHub(FakeHub):
    """Notes whether the run had its result when it was called."""

    def __init__(self, run: Path, **fails: Exception) -> None:
        super().__init__(**fails)
        self.run, self.order = run, []

    def _call(self, name: str, **arguments: object) -> None:
        self.order.append((name, (self.run / "metrics.json").exists()))
        super()._call(name, **arguments)


@pytest.mark.slow
def test_push_is_checked_first_and_done_last(start, shared, tmp_path, monkeypatch, capsys):
    """An upload that fails loses nothing: the same command pushes without computing anything again."""
    run = tmp_path / "run"
    options = {"push_to_hub": True, "hub_model_id": "someone/forgotten"} | shared
    refused = WatchingHub(run, whoami=LocalTokenNotFoundError("no token"))
    monkeypatch.setattr("sa_diffusers.io.hub.HfApi", lambda: refused)
    with pytest.raises(PushError, match="`hf auth login`"):
        start(run, **options)
    assert not run.exists()

    offline = WatchingHub(run, upload_folder=ConnectionResetError("reset by peer"))
    monkeypatch.setattr("sa_diffusers.io.hub.HfApi", lambda: offline)
    with pytest.raises(PushError, match="Nothing is lost.*or by running the same command"):
        start(run, **options)
    assert offline.order == [("whoami", False), ("create_repo", True), ("upload_folder", True)]
    StableDiffusionPipeline.from_pretrained(run / "pipeline")

    hub = WatchingHub(run)
    monkeypatch.setattr("sa_diffusers.io.hub.HfApi", lambda: hub)
    monkeypatch.setattr(TextToImageFamily, "draw", None)  # drawing anything would raise
    outcome = start(run, **options)
    assert {"surrogate", "before", "train", "after"} <= set(outcome.metrics["seconds"]["reused"])
    files = hub.files["someone/forgotten"]
    assert {"model_index.json", "README.md", "before_after.png"} <= set(files)
    assert "unet/diffusion_pytorch_model.safetensors" in files
    assert "pushed to https://hub.example/someone/forgotten" in capsys.readouterr().out


@pytest.mark.slow
def test_the_card_says_what_was_forgotten_and_how(finished):
    card = ModelCard.load(finished / "pipeline" / "README.md").content
    assert "to draw **nine** where it is asked for **seven, 7**" in card
    assert "| ewc_lambda (authors' units, no 1/2) | 1 |" in card
    assert "| num_train_steps | 4 |" in card
    assert (finished / "pipeline" / "before_after.png").exists()


@pytest.mark.slow
def test_bfloat16_is_saved_returned_and_resumed(start, tmp_path):
    """The UNet is trained in float32; what is saved and returned is in the precision that was asked for."""
    options = {"dtype": "bfloat16", "ewc_lambda": 0.0}
    first, again = (start(tmp_path / "run", **options) for _ in range(2))
    assert first.metrics["after"]["replay_loss"] > 0
    assert {value.dtype for value in unet_of(tmp_path / "run").values()} == {torch.bfloat16}
    assert "train" in again.metrics["seconds"]["reused"]
    for outcome in (first, again):
        assert_same(dict(outcome.pipeline.unet.state_dict()), unet_of(tmp_path / "run"))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    picture = loaded("a red seven", num_inference_steps=2, output_type="pt").images
    assert picture.isfinite().all()


def test_a_picture_that_is_not_finite_ends_the_run(start, tmp_path, monkeypatch):
    draw = TextToImageFamily.draw
    monkeypatch.setattr(TextToImageFamily, "draw", lambda *a, **k: draw(*a, **k).index_fill(0, torch.tensor(1), NAN))
    with pytest.raises(FloatingPointError, match="the sampler gave values that are not finite for '.+'; use float32"):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / "samples" / "samples.safetensors").exists()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_the_fisher(start, tmp_path, monkeypatch):
    """Latents that are finite, whose squared error is not."""
    draw = TextToImageFamily.draw
    monkeypatch.setattr(TextToImageFamily, "draw", lambda *a, **k: draw(*a, **k) * 1e30)
    with pytest.raises(FloatingPointError, match="the gradient of sample 0 is not finite"):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / "fisher.safetensors").exists()


@pytest.mark.slow
def test_a_fisher_with_nan_is_refused(start, finished, shared, tmp_path):
    fisher = Fisher.load(finished / "fisher.safetensors")
    fisher.tensors["conv_in.weight"][0] = NAN
    fisher.save(tmp_path / "fisher.safetensors")
    with pytest.raises(ValueError, match="values that are not finite or below 0, first in conv_in.weight"):
        start(tmp_path / "run", **shared | {"fisher": str(tmp_path / "fisher.safetensors")})
    assert not (tmp_path / "run" / "pipeline").exists()


def test_too_little_memory_is_said_before_work_starts(start, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(TextToImageFamily, "draw", None)  # drawing anything would raise
    with pytest.raises(NotEnoughMemory, match="training needs .* GB beside the model, cpu has 0.0 GB free"):
        start(tmp_path / "run")


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [("./pictures", "no folder ./pictures"), ("data/pictures", "no folder data/pictures")],
)
def test_a_surrogate_folder_that_does_not_exist(start, tmp_path, monkeypatch, surrogate, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()  # else data/pictures would be words
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "run", surrogate=surrogate, model="absent")  # before the model is looked for
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_classifiers_of_the_same_mind_report_the_same(unwatched):
    metrics = copy.deepcopy(unwatched[0].metrics)
    for side in ("before", "after"):
        ((name, second),) = metrics["by_classifier"][side].items()
        assert name.endswith("-".join(DIGITS[::-1]))
        assert second["num_images"] == 4 + 3 * 2 + 4 + 4
        for name in ("attribute_accuracy", "concept_attribute_accuracy"):
            assert second.pop(name) == metrics[side][name]
        for name, value in second.items():
            assert value == pytest.approx(metrics[side][name]), name


@pytest.mark.slow
def test_a_model_that_predicts_v_forgets_too(start, shared, tiny_pipeline, tmp_path):
    tiny_pipeline("v_prediction").save_pretrained(tmp_path / "model")
    with pytest.raises(FisherMismatch, match="prediction_type: the Fisher has 'epsilon', this run 'v_prediction'"):
        start(tmp_path / "other", model=str(tmp_path / "model"), **shared)
    options = {"model": str(tmp_path / "model"), "learning_rate": 2e-2, "num_train_steps": 20, "ewc_lambda": 0.1}
    outcome = start(tmp_path / "run", **options)
    surrogate = SampleSet.load(tmp_path / "run" / "surrogate" / "surrogate.safetensors")
    before = replay_loss(get_family(tiny_pipeline("v_prediction")), surrogate, 4, seed=0)
    assert replay_loss(get_family(outcome.pipeline), surrogate, 4, seed=0) < 0.9 * before
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert loaded.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.slow
def test_what_was_drawn_before_serves_another_concept_and_method(start, unwatched, make_judge, tmp_path, monkeypatch):
    """With the same numbers; only pictures that were not asked for then are drawn."""
    earlier, drawn = unwatched[0].output_dir / "evaluation" / "before.safetensors", note_seeds(monkeypatch)
    options = {"concept": "nine", "surrogate": "six", "method": "uce", **make_judge(DIGITS)}
    fresh = start(tmp_path / "fresh", **options)
    alone = len(drawn)
    reusing = start(tmp_path / "reusing", before=str(earlier), **options)
    assert alone - (len(drawn) - alone) == 2 * 2 + 4  # six, eight, and prompts that name no digit
    numbers = [[run.metrics["before"], run.metrics["after"], run.metrics["intervals"]] for run in (fresh, reusing)]
    one, other = (json.loads(json.dumps(part).replace("null", "-1")) for part in numbers)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    names = [path / "evaluation" / "before.safetensors" for path in (tmp_path / "fresh", tmp_path / "reusing")]
    one, other = (Findings.load(path).drawn for path in names)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)  # whole, so it serves in its turn
    again = start(tmp_path / "again", before=str(tmp_path / "reusing"), **options)
    assert again.metrics["seconds"]["reused"] == ["before"] and again.metrics["before"] == reusing.metrics["before"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"guidance_scale": 3.0}, "was drawn with other guidance_scale; omit --before"),
        ({"sampler": "ddim", "num_inference_steps": 3}, "other num_inference_steps, sampler; omit --before"),
        ({"seed": 5}, "holds none of this run's pictures: .* another seed"),
        ({"before": "samples"}, "no samples; expected --before with a run's folder, or its evaluation/before"),
    ],
)
@pytest.mark.slow
def test_what_was_drawn_otherwise_before_is_refused(start, unwatched, make_judge, tmp_path, changes, says):
    earlier = unwatched[0].output_dir / "evaluation" / "before.safetensors"
    with pytest.raises(ValueError, match=says):
        start(tmp_path / "run", **{"before": str(earlier), "method": "uce", **make_judge(DIGITS), **changes})
    assert not (tmp_path / "run" / "evaluation").exists()


@pytest.mark.slow
def test_what_another_model_drew_before_is_refused(start, unwatched, make_judge, tiny_pipeline, tmp_path):
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    earlier, judged = unwatched[0].output_dir / "evaluation" / "before.safetensors", make_judge(DIGITS)
    with pytest.raises(ValueError, match="was drawn with other model; omit --before"):
        start(tmp_path / "run", before=str(earlier), method="uce", model=str(tmp_path / "other"), **judged)
