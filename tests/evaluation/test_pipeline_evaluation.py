"""scripts/evaluate.py on text-to-image pipelines: what is drawn, measured, resumed, refused and shown."""

import base64
import html
import io
import json
import math
import re
import shutil
from dataclasses import asdict, replace

import matplotlib.cbook
import pytest
import torch
from PIL import Image
from tiny_clip import save_tiny_clip
from tiny_text_to_image import make
from torch.testing import assert_close

from sa_diffusers import ConditionalVAE, ConditionalVAEPipeline
from sa_diffusers.cli import evaluate as script
from sa_diffusers.core.concepts import Concept
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.images import crop_to_square, read_image
from sa_diffusers.data.sampling import Request
from sa_diffusers.evaluation import drawing as pipeline_drawing
from sa_diffusers.evaluation.forgetting import summarise
from sa_diffusers.evaluation.images.metrics import frechet_distance
from sa_diffusers.evaluation.intervals import wilson_interval
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judges.clip import Clip
from sa_diffusers.evaluation.judges.nudity import EXPOSED, Detection, NudityDetector, per_image
from sa_diffusers.evaluation.judging import BodyJudge, ClipJudge
from sa_diffusers.evaluation.measurements import Measurement, cell, headline, measurements
from sa_diffusers.evaluation.options import ASKING, PipelineEvaluationConfig
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.evaluation.subjects import open_subjects, short_names
from sa_diffusers.evaluation.suite.evaluate import evaluate_pipelines, exposed_parts
from sa_diffusers.evaluation.suite.sections import sections
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.report.pictures import mosaic, to_uint8


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROWS = [
    {"prompt": "a red seven", "form": "seen", "digit": "seven", "ink": "red"},
    {"prompt": "a blue seven digit", "form": "held_out", "digit": "seven", "ink": "blue"},
    {"prompt": "a red nine", "form": "seen", "digit": "nine", "ink": "red"},
    {"prompt": "blue digit two", "form": "seen", "digit": "two", "ink": "blue"},
    {"prompt": "a blue digit", "form": "seen", "ink": "blue"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_pipeline):
    """Two pipelines, a classifier of their pictures, and small files of prompts."""
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline(seed=0).save_pretrained(root / "before" / "pipeline")
    tiny_pipeline(seed=1).save_pretrained(root / "after" / "pipeline")
    torch.manual_seed(0)
    attributes = {"digit": NAMES, "ink": ["red", "blue"]}
    words = {"digit": {name: [name] for name in NAMES}, "ink": {"red": ["red"], "blue": ["blue"]}}
    words["digit"]["seven"] = ["seven", "7"]
    AttributeClassifier(attributes, words, image_size=16, channels=(8, 8, 8)).save_pretrained(root / "classifier")
    (root / "templates.txt").write_text("a {}\na red {}\na digit {} on black\n")
    (root / "prompts.txt").write_text("\n".join(row["prompt"] for row in ROWS))
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return root


@pytest.fixture
def options(folders, tmp_path) -> dict:
    return {
        "pipeline": str(folders / "before"), "compare": [str(folders / "after" / "pipeline")], "concept": "seven, 7",
        "neighbours": "nine, two", "classifier": str(folders / "classifier"), "metrics": "classifier,change",
        "templates": str(folders / "templates.txt"), "prompts": str(folders / "prompts.txt"),
        "eval_prompts": str(folders / "rows.jsonl"), "num_images": 5, "num_inference_steps": 2, "batch_size": 3,
        "output_dir": str(tmp_path / "out"), "pictures_shown": 2,
    }  # fmt: skip


def rows_of(found: dict, pipeline: str) -> dict:
    return {(row["group"], row["measure"]): row for row in found["results"][pipeline]}


def test_two_pipelines_picture_by_picture(options, folders, tmp_path):
    options |= {"sets": "concept,neighbours,unrelated", "num_images": 3}
    found = evaluate_pipelines(PipelineEvaluationConfig(**options))
    out = tmp_path / "out"
    assert list(found["sets"]) == ["concept", "neighbours", "unrelated"]
    classifier = AttributeClassifier.from_pretrained(folders / "classifier").eval()
    families = {
        name: get_family(load_pipeline(str(folders / name / "pipeline"), None, None, "float32"))
        for name in ("before", "after")
    }
    drawn, read = {}, {}
    for name, family in families.items():
        suite = json.loads((out / name / "values.json").read_text())["prompts"]
        for group, prompts in suite.items():
            for i, row in enumerate(prompts):
                image = family.decode(family.draw([Condition(row["prompt"])], [row["seed"]], 7.5, 2))
                image = to_uint8(image).float() / 127.5 - 1
                saved = read_image(out / name / group / f"{i:05d}.png")
                assert_close(saved, image[0], rtol=0, atol=1.01 / 127.5)  # batches of 3 may round another way
                drawn[name, group, i] = saved.double()
                with torch.no_grad():
                    read[name, group, i] = {k: v[0].double().softmax(0) for k, v in classifier(saved[None]).items()}
    for name in families:
        results = rows_of(found, name)
        for group in suite:
            for measure in ("concept_probability", "concept_entropy", "accuracy", "attributes", "pixel_change"):
                values, differences = [], []
                for i, row in enumerate(suite[group]):
                    value, other = (
                        expected(measure, read[n, group, i], row["labels"], drawn["before", group, i],
                                 drawn[n, group, i]) for n in (name, "before")
                    )  # fmt: skip
                    values += [] if math.isnan(value) else [value]
                    differences += [] if math.isnan(value) else [value - other]
                asked = measure.startswith("concept") == (found["sets"][group]["purpose"] == "asks")
                if measure in ("concept_probability", "concept_entropy", "accuracy") and not asked:
                    assert (group, measure) not in results
                elif measure == "pixel_change" and name == "before" or not values:
                    assert (group, measure) not in results
                else:
                    row = results[group, measure]
                    assert row["num_images"] == len(values)
                    assert row["value"] == pytest.approx(sum(values) / len(values), rel=1e-5)
                    assert row["interval"][0] <= row["value"] <= row["interval"][1]
                    if name == "after" and measure != "pixel_change":
                        mean = sum(differences) / len(differences)
                        assert row["difference"] == pytest.approx(mean, rel=1e-4, abs=1e-7)
    assert found["pipelines"]["before"]["settings"]["guidance_scale"] == 7.5
    assert ("all that must stay", "worst_accuracy") in rows_of(found, "after")
    written = json.loads((out / "evaluation.json").read_text())
    assert written["results"].keys() == {"before", "after"} and "| after |" in (out / "evaluation.md").read_text()
    assert "concept probability  after" in found["summary"]


def expected(measure: str, read: dict, labels: dict, before: torch.Tensor, after: torch.Tensor) -> float:
    """A measure of one picture, written out."""
    if measure == "concept_probability":
        return read["digit"][7].item()
    if measure == "concept_entropy":
        return -sum(p * math.log(p) for p in read["digit"].tolist())
    if measure == "pixel_change":
        return math.sqrt(sum(((a - b) / 2) ** 2 for a, b in zip(after.ravel().tolist(), before.ravel().tolist(),
                                                               strict=True)) / before.numel())  # fmt: skip
    if measure == "accuracy":
        return float(NAMES[read["digit"].argmax()] == labels["digit"]) if "digit" in labels else math.nan
    return float(["red", "blue"][read["ink"].argmax()] == labels["ink"]) if "ink" in labels else math.nan


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_where_it_was(options, tmp_path, monkeypatch, capsys):
    options |= {"compare": [], "metrics": "classifier", "sets": "concept,neighbours", "num_images": 3, "batch_size": 2}
    evaluate_pipelines(PipelineEvaluationConfig(**options | {"output_dir": str(tmp_path / "whole")}))
    asked, draw = [], pipeline_drawing.draw_batch

    def draw_until(limit: int):
        def limited(family, requests, settings):
            if len(asked) + len(requests) > limit:
                raise KeyboardInterrupt
            asked.extend(request.seed for request in requests)
            return draw(family, requests, settings)

        monkeypatch.setattr(pipeline_drawing, "draw_batch", limited)

    draw_until(4)
    with pytest.raises(KeyboardInterrupt):
        evaluate_pipelines(PipelineEvaluationConfig(**options))
    assert len(asked) == 3 and not (tmp_path / "out" / "evaluation.json").exists()  # 2 + 1 of the first set
    (tmp_path / "out" / "before" / "concept" / ".01234567.00001.png").write_text("half a picture")
    draw_until(100)
    found = evaluate_pipelines(PipelineEvaluationConfig(**options))
    assert len(asked) == len(set(asked)) == 6 == sum(part["num_images"] for part in found["sets"].values())
    evaluate_pipelines(PipelineEvaluationConfig(**options | {"batch_size": 3}))
    assert len(asked) == 6
    whole, resumed = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("whole", "out")
    )
    assert len(whole) == 6 and whole == resumed

    with pytest.raises(StageMismatch, match=r"prompts.first_seed: \d+ -> \d+"):
        evaluate_pipelines(PipelineEvaluationConfig(**options | {"seed": 1}))
    with pytest.raises(StageMismatch, match="prompts.number: 3 -> 4"):
        evaluate_pipelines(PipelineEvaluationConfig(**options | {"num_images": 4}))
    with pytest.raises(StageMismatch, match=r'prompts.concept: \["seven", "7"\] -> \["nine"\]'):
        evaluate_pipelines(PipelineEvaluationConfig(**options | {"concept": "nine"}))
    with pytest.raises(StageMismatch, match="settings.num_inference_steps: 2 -> 3"):
        evaluate_pipelines(PipelineEvaluationConfig(**options | {"num_inference_steps": 3}))
    assert len(asked) == 6
    capsys.readouterr()
    evaluate_pipelines(PipelineEvaluationConfig(**options | {"num_inference_steps": 3, "overwrite": True}))
    assert len(asked) == 12 and "of which the folder holds 0" in capsys.readouterr().out  # those of 2 steps are others
    evaluate_pipelines(PipelineEvaluationConfig(**options | {"num_inference_steps": 3}))
    assert len(asked) == 12 and "of which the folder holds 6" in capsys.readouterr().out


@pytest.mark.slow
def test_other_pipelines_than_stable_diffusion_draw_by_themselves(options, tmp_path, tiny_tokenizer):
    pipeline = perturbed_xl(tiny_tokenizer)
    pipeline.save_pretrained(tmp_path / "xl")
    options |= {"pipeline": str(tmp_path / "xl"), "compare": [], "metrics": "classifier", "sets": "concept"}
    found = evaluate_pipelines(PipelineEvaluationConfig(**options | {"num_images": 2}))
    assert found["pipelines"]["xl"]["settings"] == {
        "guidance_scale": None, "num_inference_steps": 2, "sampler": "pipeline"
    }  # fmt: skip
    rows = json.loads((tmp_path / "out" / "xl" / "values.json").read_text())["prompts"]["concept"]
    for index, row in enumerate(rows):
        generator = torch.Generator().manual_seed(row["seed"])
        image = pipeline(row["prompt"], generator=generator, num_inference_steps=2, output_type="pt").images[0]
        saved = read_image(tmp_path / "out" / "xl" / "concept" / f"{index:05d}.png")
        assert_close(saved, 2 * image - 1, rtol=0, atol=1.01 / 127.5)
    with pytest.raises(ValueError, match="a StableDiffusionXLPAGPipeline, which has its own sampler"):
        evaluate_pipelines(PipelineEvaluationConfig(**options | {"sampler": "ddim"}))


def perturbed_xl(tokenizer):
    """Of a class that no family adapts."""
    from diffusers import StableDiffusionXLPAGPipeline

    pipeline = StableDiffusionXLPAGPipeline(**make("xl", tokenizer).components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_safety_checker_is_never_run(options, tmp_path, tiny_pipeline, safety_checker):
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
    from transformers import CLIPImageProcessorPil

    parts = tiny_pipeline().components
    unet = UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=8)
    parts |= {"safety_checker": safety_checker, "feature_extractor": CLIPImageProcessorPil(), "unet": unet}
    parts |= {"scheduler": LCMScheduler()}
    LatentConsistencyModelPipeline(**parts).save_pretrained(tmp_path / "checked")  # drawn by its own call
    options |= {"pipeline": str(tmp_path / "checked"), "compare": [], "metrics": "classifier", "sets": "concept"}
    assert evaluate_pipelines(PipelineEvaluationConfig(**options))["sets"]["concept"]["num_images"] == 5


@pytest.mark.slow
def test_distributions_of_kept_pictures(options, tmp_path, folders):
    real = tmp_path / "real"
    real.mkdir()
    for index in range(6):
        Image.frombytes("RGB", (16, 16), torch.randint(256, (768,)).byte().numpy().tobytes()).save(
            real / f"{index}.png"
        )
    options |= {"metrics": "fid", "classifier": None, "sets": "neighbours,unrelated", "real": str(real)}
    found = evaluate_pipelines(PipelineEvaluationConfig(**options, extractor=str(folders / "classifier")))
    classifier = AttributeClassifier.from_pretrained(folders / "classifier").eval()
    features = {}
    for name in ("before", "after"):
        paths = [tmp_path / "out" / name / group / f"{i:05d}.png" for group in ("neighbours", "unrelated")
                 for i in range(5)]  # fmt: skip
        features[name] = classifier.features(torch.stack([read_image(path) for path in paths])).detach()
    features["real"] = classifier.features(torch.stack([read_image(p) for p in sorted(real.iterdir())])).detach()
    for name, group, other in (
        ("after", "distance to before", "before"), ("after", "distance to real", "real"),
        ("before", "distance to real", "real"),
    ):  # fmt: skip
        row = rows_of(found, name)[group, "frechet_distance"]
        assert_close(row["value"], frechet_distance(real=features[other], generated=features[name]), rtol=1e-3,
                     atol=1e-7)  # fmt: skip
        assert row["num_images"] == 10 and row["interval"] is None
    assert ("distance to before", "frechet_distance") not in rows_of(found, "before")


def prompt_set(purpose: str, prompts: list[str], labels: list[dict] | None = None) -> PromptSet:
    requests = [Request(Condition(prompt), seed) for seed, prompt in enumerate(prompts)]
    named = labels or [{}] * len(prompts)
    return PromptSet(purpose, requests, [Candidate(*pair) for pair in zip(prompts, named, strict=True)])


def test_means_differences_and_the_worst_class():
    labels = [{"digit": "two"}, {"digit": "two"}, {"digit": "nine"}, {}]
    suite = {
        "neighbours": prompt_set("keeps", list("abcd"), labels),
        "unrelated": prompt_set("keeps", ["e"], [{"digit": "nine"}]),
    }
    one, two = torch.tensor([1.0]).double(), torch.tensor([1.0, 0, 1, math.nan]).double()
    before = {"neighbours": {"accuracy": two.clone().index_fill(0, torch.tensor([1]), 1)},
              "unrelated": {"accuracy": one}}  # fmt: skip
    after = {"neighbours": {"accuracy": two}, "unrelated": {"accuracy": one, "pixel_change": one / 2}}
    found = {(m.group, m.measure): m for m in measurements(suite, after, before, "digit")}
    both = found["all that must stay", "accuracy"]
    assert (both.value, both.num_images, both.difference) == (0.75, 4, -0.25)
    assert both.difference_interval[0] < -0.25 < both.difference_interval[1]
    worst = found["all that must stay", "worst_accuracy"]
    assert (worst.value, worst.remark, worst.num_images, worst.difference) == (0.5, "two", 2, None)
    assert worst.interval[0] < 0.1
    alone = found["unrelated", "worst_accuracy"]  # all equal: an interval without width would be a lie
    assert alone.value == 1 and alone.interval[0] < 0.5
    alone = found["all that must stay", "pixel_change"]
    assert (alone.num_images, alone.difference, alone.interval) == (1, None, None)  # one picture: nothing is known
    assert cell(alone) == ["0.500", "n = 1"]
    assert cell(replace(alone, difference=0.25))[2] == "+0.250"
    assert all(m.difference is None for m in measurements(suite, before, None, "digit"))

    same = measurements({"a": prompt_set("keeps", ["p", "q"])}, {"a": {"pixel_change": torch.zeros(2)}}, None, None)
    assert same[0].interval == (0, 0)

    # Pictures of one prompt are one group: the interval does not shrink by drawing more of the same.
    few = measurements({"i2p": prompt_set("i2p", ["a", "b"])}, {"i2p": {"exposed": torch.tensor([0.0, 1])}},
                       None, None)  # fmt: skip
    many = measurements({"i2p": prompt_set("i2p", ["a", "b"] * 50)},
                        {"i2p": {"exposed": torch.tensor([0.0, 1] * 50)}}, None, None)  # fmt: skip
    assert few[0].interval == pytest.approx(many[0].interval) and many[0].num_images == 100


def test_the_names_of_classes_are_grouped_as_in_a_run():
    """Each class has one prompt, its name: classes are no sample, and their pictures count singly."""
    names = [name for name in ("two", "nine") for _ in range(20)]
    right = torch.tensor([1.0] * 15 + [0.0] * 5 + [1.0] * 20)
    named = prompt_set("keeps", names, [{"digit": name} for name in names])
    (found, _) = measurements({"neighbours": named}, {"neighbours": {"accuracy": right}}, None, "digit")
    assert found.interval == pytest.approx(wilson_interval(35 / 40, 40))
    assert (
        found.interval
        == summarise("digit", {"retained": named}, {"retained": {"accuracy": right}})[1]["retained_accuracy"]
    )


def test_an_exposed_part_is_counted_by_the_papers_names():
    found = [[Detection("BELLY_EXPOSED", 0.9, (0, 0, 1, 1))] * 2, [], [Detection("FACE_FEMALE", 0.9, (0, 0, 1, 1))]]

    def counted(detections: list) -> dict:
        return {label: per_image(detections, [label]) for label in EXPOSED}

    values = {"a": {"i2p": counted(found), "concept": counted([[]])}, "b": {"i2p": counted([[]] * 3), "concept": {}}}
    rows = {name: {m.measure: m for m in rows} for name, rows in exposed_parts(values).items()}
    belly = rows["a"]["EXPOSED_BELLY"]
    assert (belly.group, belly.value, belly.remark, belly.num_images) == ("exposed parts: i2p", 2, "in 1 pictures", 3)
    assert rows["a"]["total"].value == 2 and rows["b"]["total"].value == 0
    assert {m.group for part in rows.values() for m in part.values()} == {"exposed parts: i2p"}


def test_the_worst_pictures_come_first():
    suite = {"concept": prompt_set("asks", list("abc")), "unrelated": prompt_set("keeps",
             list("de")), "i2p": prompt_set("i2p", ["f"])}  # fmt: skip
    after = {
        "concept": {"concept_probability": torch.tensor([0.1, 0.9, 0.3]), "pixel_change": torch.ones(3)},
        "unrelated": {"pixel_change": torch.tensor([0.1, 0.2])},
        "i2p": {"exposed": torch.tensor([1.0])},
    }
    found = sections(suite, {"before": {}, "after": after} | {"before": dict.fromkeys(suite, {})}, 2, "before")
    shown = [(s.title, s.pipelines, [place[:2] for place in s.places]) for s in found]
    assert shown == [
        ("after: kept pictures that changed most", ["before", "after"], [("unrelated", 1), ("unrelated", 0)]),
        ("after: pictures that show the concept most", ["before", "after"], [("concept", 1), ("concept", 2)]),
        ("after: pictures with an exposed part", ["before", "after"], [("i2p", 0)]),
        ("concept", ["before", "after"], [("concept", 0), ("concept", 1)]),
        ("unrelated", ["before", "after"], [("unrelated", 0), ("unrelated", 1)]),
        ("i2p", ["before", "after"], [("i2p", 0)]),
    ]
    assert found[0].places[0][2] == "change of pixels 0.200"


@pytest.mark.parametrize("show", [False, True])
def test_the_page_blurs_pixels_unless_told_not_to(options, tmp_path, show):
    rows = tmp_path / "i2p.jsonl"
    columns = {"sd_seed": 5, "categories": "sexual"}
    rows.write_text(json.dumps({"prompt": "a red one", **columns}))
    options |= {"compare": [], "metrics": "classifier", "sets": "i2p,concept", "i2p": str(rows), "show_nsfw": show}
    evaluate_pipelines(PipelineEvaluationConfig(**options))
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"<script|src=\"(?!data:)|https?://", page)
    shown = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)]
    drawn = {path.read_bytes() for path in (tmp_path / "out" / "before").rglob("*.png")}
    originals = [Image.open(io.BytesIO(data)).convert("RGB") for data in drawn]
    allowed = {(image if show else mosaic(image)).tobytes() for image in originals}
    assert shown and all(image.tobytes() in allowed for image in shown)
    assert len(Image.open(tmp_path / "out" / "before" / "i2p" / "00000.png").getcolors()) > 64
    assert ("--show_nsfw" in page.split("<details")[0]) == (not show)


def test_a_mosaic_does_not_hold_what_it_hides():
    tiny = Image.frombytes("RGB", (32, 32), torch.randint(256, (3 * 32 * 32,)).byte().numpy().tobytes())
    assert (
        mosaic(tiny).tobytes()
        == tiny.resize((4, 4), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BICUBIC).tobytes()
    )
    noise = Image.frombytes("RGB", (256, 256), torch.randint(256, (3 * 256 * 256,)).byte().numpy().tobytes())
    blurred = mosaic(noise)
    assert blurred.size == noise.size
    means = noise.resize((8, 8), Image.Resampling.BOX)
    assert mosaic(means.resize((256, 256), Image.Resampling.NEAREST)).tobytes() == blurred.tobytes()


@pytest.mark.slow
def test_bodies_and_faces():
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = crop_to_square(Image.open(file).convert("RGB"), 320)
    images = torch.stack([portrait, torch.zeros(3, 320, 320)])
    judge = BodyJudge(NudityDetector(0.3), 0.6, 0.3, scorer=lambda pictures: torch.full((len(pictures),), 0.25))
    found = judge(images, prompt_set("asks", ["a", "b"]), None)
    assert found["exposed"].tolist() == [0, 0] and found["no_face"].tolist() == [0, 1]
    assert found["identity"][0] == 0.25 and found["identity"][1].isnan()
    assert list(judge(images, prompt_set("keeps", ["a", "b"]), None)) == [*EXPOSED, "exposed"]
    strict = BodyJudge(NudityDetector(0.3), 0.6, 0.95, scorer=judge.scorer)
    assert strict(images, prompt_set("asks", ["a", "b"]), None)["no_face"].tolist() == [1, 1]


def test_clip_names_what_was_asked_for(tiny_tokenizer, tmp_path):
    clip = Clip.load(str(save_tiny_clip(tmp_path / "clip", tiny_tokenizer)))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    judge = ClipJudge(clip, Concept(("seven", "7"), "noise", ("nine", "two")))
    texts = clip.embed_texts([f"a photo of {name}" for name in ("seven", "nine", "two")])
    best = [max(range(3), key=lambda k, e=e: float(e @ texts[k])) for e in clip.embed_images(images)]
    candidates = [Candidate("a nine", {}, word) for word in ("nine", "two", "", "nine")]
    kept = PromptSet("keeps", [Request(Condition("a nine"), 0)] * 4, candidates)
    found = judge(images, kept, None)
    wanted = [float(best[0] == 1), float(best[1] == 2), math.nan, float(best[3] == 1)]
    assert_close(found["clip_accuracy"], torch.tensor(wanted), equal_nan=True)
    scores = [100 * max(0.0, float(e @ clip.embed_texts(["a nine"])[0])) for e in clip.embed_images(images)]
    assert_close(found["clip_score"], torch.tensor(scores))
    asked = judge(images, prompt_set("asks", ["a 7"] * 4), None)
    assert asked["clip_concept"].tolist() == [float(index == 0) for index in best]
    assert "clip_accuracy" not in asked
    found = ClipJudge(clip, Concept(("seven",), "noise"))(images, kept, None)
    assert list(found) == ["clip_score", "clip_binding"] and found["clip_binding"].isnan().all()


@pytest.mark.slow
def test_all_judges_at_once_by_the_script(options, tmp_path, tiny_tokenizer, monkeypatch, capsys):
    rows = tmp_path / "i2p.jsonl"
    lines = [{"prompt": "a red one", "sd_seed": seed, "categories": "sexual"} for seed in (5, 6, 7)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    clip = save_tiny_clip(tmp_path / "clip", tiny_tokenizer)
    words = [
        options["pipeline"],
        "--compare",
        *options["compare"],
        "--concept",
        "seven, 7",
        "--neighbours",
        "nine, two",
    ]
    words += ["--metrics", "clip,change,nudity,identity", "--clip", str(clip), "--i2p", str(rows), "--num_i2p", "2"]
    words += ["--sets", "concept,neighbours,i2p", "--templates", options["templates"], "--num_images", "2"]
    words += ["--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    script.main(["pipelines", *words])
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {(row["group"], row["measure"]): row["num_images"] for row in found["results"]["after"]} == {
        ("concept", "clip_concept"): 2, ("concept", "clip_score"): 2, ("concept", "pixel_change"): 2,
        ("concept", "perceptual_change"): 2, ("concept", "exposed"): 2, ("concept", "no_face"): 2,
        ("neighbours", "clip_accuracy"): 2, ("neighbours", "clip_score"): 2, ("neighbours", "pixel_change"): 2,
        ("neighbours", "perceptual_change"): 2, ("neighbours", "exposed"): 2,
        ("i2p", "clip_score"): 2, ("i2p", "pixel_change"): 2, ("i2p", "perceptual_change"): 2, ("i2p", "exposed"): 2,
    }  # fmt: skip
    changes = [row for row in found["results"]["after"] if row["measure"] == "perceptual_change"]
    assert all(row["value"] > 0 and row["difference"] is None for row in changes)
    assert found["judges"]["clip"] == str(clip)
    assert "exposed parts from a score of 0.6, faces from 0.35" in found["judges"]["nudity"]
    assert "They are blurred in this file" in (tmp_path / "out" / "report.html").read_text()
    assert f"saved {tmp_path / 'out'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "classifier,lpips"}, "expected --metrics of classifier, clip, .* got 'lpips'"),
        ({"sets": "concept,typos"}, "expected --sets of concept, .* got 'typos'"),
        ({"concept": " , "}, "expected --concept"),
        ({"classifier": None, "metrics": "classifier"}, "the metric classifier: expected --classifier"),
        ({"metrics": "change"}, "--classifier is for the metric classifier"),
        ({"compare": []}, "the metric change: expected --compare"),
        ({"metrics": "classifier,fid", "compare": []}, "fid: expected --compare, or --real"),
        ({"real": "images"}, "--real is for the metrics fid, kid, is, prc"),
        ({"metrics": "classifier", "clip": "x/y"}, "--clip is for the metrics clip, identity and change"),
        ({"nudity_threshold": 0.1}, "expected 0.25 <= nudity_threshold <= 1, got 0.1"),
        ({"sets": "i2p"}, "the set i2p: expected --i2p with its source"),
        ({"names": ["a", "a"]}, "expected 2 different --names"),
        ({"names": ["Report.html", "b"]}, "expected other --names than report.html, evaluation.md"),
        ({"names": ["a", "../b"]}, "expected --names that can be folders, got '../b'"),
        ({"translations": "klingon: Pitt"}, "expected --translations as 'de: Hund, fr: chien'"),
        ({"num_images": 0}, "num_images"),
        ({"pipeline": ""}, "expected a pipeline as the first word"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, changes, message):
    with pytest.raises(ValueError, match=message):
        PipelineEvaluationConfig(**options | changes)


def test_wrong_models_are_refused_before_a_pipeline_is_loaded(options, folders, tmp_path, monkeypatch):
    def loaded(*_: object) -> None:
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(pipeline_drawing, "load_pipeline", loaded)

    def refused(kind: type[Exception], message: str, **changes: object) -> None:
        with pytest.raises(kind, match=message):
            evaluate_pipelines(PipelineEvaluationConfig(**options | changes))
        assert not (tmp_path / "out" / "before").exists()

    refused(ValueError, "the classifier has no class named 'dog'", concept="dog")
    refused(ModelLoadError, "not on this machine and the hub cannot be reached", compare=["someone/else"])
    refused(ModelLoadError, "needs the extra fid", metrics="classifier,fid")
    refused(ValueError, "the metric 'prc' needs 4 images", metrics="classifier,prc", num_images=1, sets="unrelated")
    refused(ValueError, "fid: expected one of the sets neighbours", metrics="classifier,fid", sets="concept")
    refused(ModelLoadError, "clip", metrics="classifier,clip", clip="no/clip")
    vae = ConditionalVAEPipeline(ConditionalVAE(image_size=8, num_classes=10, hidden_sizes=(12, 8), latent_dim=2))
    vae.save_pretrained(tmp_path / "vae" / "pipeline")
    refused(ValueError, "a ConditionalVAEPipeline, which does not draw pictures from a prompt alone",
            compare=[str(tmp_path / "vae")])  # fmt: skip
    with pytest.raises(AssertionError, match="a pipeline was loaded"):
        evaluate_pipelines(PipelineEvaluationConfig(**options))


def test_pictures_of_another_size_than_the_classifier_reads_are_refused_before_drawing(options, tmp_path):
    AttributeClassifier({"digit": NAMES}, None, image_size=32, channels=(8, 8, 8)).save_pretrained(tmp_path / "large")
    options |= {"classifier": str(tmp_path / "large"), "concept": "seven"}
    with pytest.raises(ValueError, match="expected pictures of 32 pixels a side, .* got 16"):
        evaluate_pipelines(PipelineEvaluationConfig(**options))
    assert not list((tmp_path / "out").rglob("*.png"))


def unloaded(monkeypatch) -> None:
    """From here on no pipeline may be loaded."""

    def loaded(*_: object) -> None:
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(pipeline_drawing, "load_pipeline", loaded)


@pytest.mark.parametrize("pipeline", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_files_of_somebody_else_are_kept(options, tmp_path, monkeypatch, pipeline):
    notes = tmp_path / "out" / pipeline / "concept" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    options |= {"sets": "concept", "num_images": 2}
    with monkeypatch.context() as patch:
        unloaded(patch)
        with pytest.raises(ValueError, match="concept holds files that this evaluation did not make; pass another"):
            evaluate_pipelines(PipelineEvaluationConfig(**options))
    assert notes.read_text() == "mine" and [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [notes]
    evaluate_pipelines(PipelineEvaluationConfig(**options | {"overwrite": True}))
    assert len(list((tmp_path / "out" / pipeline / "concept").iterdir())) == 2


@pytest.mark.parametrize("name", ["pipeline/model_index.json", "config.yaml", "attack.json", "report.html"])
def test_the_folder_of_a_run_is_no_output_folder(options, tmp_path, monkeypatch, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    unloaded(monkeypatch)
    with pytest.raises(ValueError, match=f"out holds {name}, .* pass another --output_dir"):
        evaluate_pipelines(PipelineEvaluationConfig(**options | {"overwrite": True}))
    assert file.read_text() == "mine" and len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == 1


def large_pipeline(tiny_pipeline, folder):
    """Pictures of 32 pixels where the others have 16."""
    parts = tiny_pipeline(seed=1).components
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_config({**parts["unet"].config, "sample_size": 16})
    StableDiffusionPipeline(**parts | {"unet": unet}, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


def test_pipelines_that_cannot_be_compared_are_refused_before_one_is_drawn(
    options, tmp_path, monkeypatch, tiny_pipeline
):
    large = large_pipeline(tiny_pipeline, tmp_path / "large")
    without, cut = tmp_path / "without", tmp_path / "cut"
    for folder in (without, cut):
        tiny_pipeline().save_pretrained(folder)
    (without / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weights = cut / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    unloaded(monkeypatch)
    change = {"metrics": "change", "classifier": None}
    for kind, message, changes in [
        (ValueError, "expected pictures of 16 pixels a side, .* got 32 from .*large", {"compare": [large]}),
        (ValueError, "expected pictures of 16 pixels a side, .* got 32", {"compare": [large]} | change),
        (ModelLoadError, "unet holds no weights .* Copy or download it again", {"compare": [str(without)]}),
        (ModelLoadError, "model.safetensors is damaged", {"compare": [str(cut)]}),
    ]:
        with pytest.raises(kind, match=message):
            evaluate_pipelines(PipelineEvaluationConfig(**options | changes))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_pictures_of_another_size_that_only_drawing_tells_are_not_kept(options, tmp_path, tiny_tokenizer):
    perturbed_xl(tiny_tokenizer).save_pretrained(tmp_path / "xl")
    AttributeClassifier({"digit": NAMES}, None, image_size=32, channels=(8, 8, 8)).save_pretrained(tmp_path / "large")
    options |= {"classifier": str(tmp_path / "large"), "concept": "seven", "pipeline": str(tmp_path / "xl")}
    with pytest.raises(ValueError, match="expected pictures of 32 pixels a side, .* got 16 from .*xl"):
        evaluate_pipelines(PipelineEvaluationConfig(**options | {"compare": [], "metrics": "classifier"}))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_prompts_that_leave_the_concept_open_are_a_set_of_their_own(options, tmp_path):
    options |= {"compare": [], "metrics": "classifier", "num_images": 3}
    found = evaluate_pipelines(PipelineEvaluationConfig(**options))
    prompts = json.loads((tmp_path / "out" / "before" / "values.json").read_text())["prompts"]
    asked = {name: {row["prompt"] for row in rows} for name, rows in prompts.items()}
    assert asked["open"] == {"a blue digit"}
    assert asked["unrelated"] == asked["labelled"] == {"a red nine", "blue digit two"}
    rows = rows_of(found, "before")
    assert ("open", "concept_shown") in rows and ("all that must stay", "concept_shown") not in rows
    assert rows["all that must stay", "accuracy"]["num_images"] == 9  # neighbours, unrelated, labelled


def test_what_any_of_the_pipelines_forgot_is_not_asked_for(options, folders, tmp_path):
    """Besides the concept: of the compared one too, and of both the same prompts."""
    shutil.copytree(folders / "after", tmp_path / "forgot")
    records = [{"concept": said, "method": "some"} for said in ("7", "nine, 9")]
    write_json({"forgotten": records, "files": {}}, tmp_path / "forgot" / "pipeline" / "forgotten.json")
    options |= {"compare": [str(tmp_path / "forgot")], "metrics": "classifier", "num_images": 3}
    found = evaluate_pipelines(PipelineEvaluationConfig(**options))
    first, second = (
        json.loads((tmp_path / "out" / n / "values.json").read_text())["prompts"] for n in found["results"]
    )
    assert first == second
    kept = {name: {row["prompt"] for row in rows} for name, rows in first.items() if name not in ASKING}
    assert kept["unrelated"] == kept["labelled"] == {"blue digit two"} and kept["open"] == {"a blue digit"}
    assert kept["neighbours"] and all("two" in prompt for prompt in kept["neighbours"])
    assert found["forgotten_besides"] == ["nine", "9"]
    assert "Left out of what must stay, since a pipeline has forgotten it: nine, 9." in found["notes"]


@pytest.mark.slow
def test_the_page_begins_with_the_result(options, folders, tmp_path):
    found = evaluate_pipelines(PipelineEvaluationConfig(**options | {"num_images": 2}))
    before, after = ({m: rows_of(found, name)[g, m]["value"] for g, m in (
        ("all that ask for the concept", "concept_probability"), ("all that must stay", "accuracy"),
    )} for name in ("before", "after"))  # fmt: skip
    rows = rows_of(found, "after")
    sets = ", ".join(
        f"{name} {rows[name, 'accuracy']['value']:.1%}" for name in ("neighbours", "unrelated", "labelled")
    )
    kept = "; where something else must stay, accuracy went from "
    sentence = (
        f"after: where “seven” is asked for, concept probability went from {before['concept_probability']:.1%} "
        f"to {after['concept_probability']:.1%}{kept}{before['accuracy']:.1%} to {after['accuracy']:.1%} ({sets})."
    )
    assert found["result"] == [sentence] and found["summary"].startswith(sentence)
    assert sentence in (tmp_path / "out" / "evaluation.md").read_text()
    page = re.sub(r">\s+<", "><", html.unescape((tmp_path / "out" / "report.html").read_text()))
    assert "same seed; values.json" in page and not re.search(r"<small>[^<]*seed", page)  # captions without numbers
    assert str(folders) not in page and str(tmp_path) not in page  # what this machine's folders are called
    settings = "<td>StableDiffusionPipeline</td><td>7.5</td><td>2</td><td>dpmsolver++</td>"
    parts = [
        sentence, "before (reference)", f"<td>after</td>{settings}", "of shares Wilson's",
        "<h3>all that ask for the concept</h3>", "<h2>Pictures</h2>", "<h2>Numbers of each set</h2>",
        "<h3>concept: ask for the concept</h3>",
    ]  # fmt: skip
    places = [page.index(part) for part in parts]
    assert places == sorted(places)


def test_a_sentence_says_what_was_measured():
    suite = {"i2p": prompt_set("i2p", ["a"]), "unrelated": prompt_set("keeps", ["b"])}

    def rows(share: float) -> list[Measurement]:
        return [Measurement("i2p", "exposed", share, None, 1), Measurement("unrelated", "pixel_change", 0.1, None, 1)]

    stay = "where something else must stay, change of pixels"
    exposed = "in the pictures of I2P, nudity"
    assert headline({"a": rows(0.5)}, suite, "nudity") == [f"a: {exposed} is 50.0%; {stay} is 0.100."]
    assert headline({"a": rows(0.5)[:1], "b": rows(0.1), "c": []}, suite, "nudity") == [
        f"b: {exposed} went from 50.0% to 10.0%; {stay} is 0.100."
    ]


def test_names_and_settings_of_pipelines(options, folders, tmp_path):
    assert short_names(["runs/report.html"]) == ["report.html-2"]  # that of the page
    assert short_names(["runs/a/pipeline", "a", "CompVis/stable-diffusion-v1-4", "x/a"]) == [
        "a", "a-2", "stable-diffusion-v1-4", "a-3"
    ]  # fmt: skip
    config = PipelineEvaluationConfig(**options | {"num_inference_steps": None})
    (folders / "before" / "config.yaml").write_text("num_inference_steps: 7\nsampler: ddim\n")
    subjects = open_subjects(config.sources, config.names, config.drawn_as)
    (folders / "before" / "config.yaml").unlink()
    assert [subject.name for subject in subjects] == ["before", "after"]
    assert {subject.class_name for subject in subjects} == {"StableDiffusionPipeline"}
    settings = {"guidance_scale": 7.5, "num_inference_steps": 7, "sampler": "ddim"}
    assert [asdict(subject.settings) for subject in subjects] == [settings] * 2  # of the first, for all


def test_the_script(options, folders, tmp_path, monkeypatch, capsys):
    words = [options.pop("pipeline"), "--compare", *options.pop("compare"), "--num_images", "2", "--sets", "concept"]
    options.pop("num_images")
    named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    script.main(["pipelines", *words, *named])
    shown = capsys.readouterr().out
    assert "draw 2 pictures a pipeline, 4 in all, of which the folder holds 0" in shown
    assert "fewer than 10,000: misspellings" in shown and f"saved {tmp_path / 'out'}: report.html" in shown
    with pytest.raises(SystemExit) as error:
        script.main(["pipelines", *words, *named, "--metrics", "ssim"])
    assert error.value.code == 2 and "got 'ssim'" in capsys.readouterr().err
