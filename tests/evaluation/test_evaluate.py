"""scripts/evaluate.py: sets of images, runs that are drawn and judged, and the whole script on both."""

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

from sa_diffusers import ConditionalVAE, ConditionalVAEPipeline
from sa_diffusers.cli import evaluate as script
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.images import read_image
from sa_diffusers.data.labelled_images import load_labelled_images
from sa_diffusers.evaluation.images.comparison import evaluate
from sa_diffusers.evaluation.images.metrics import frechet_distance, manifold_metrics
from sa_diffusers.evaluation.images.options import FoldersConfig, RunConfig
from sa_diffusers.evaluation.images.run_images import forgotten_labels, open_run
from sa_diffusers.evaluation.images.sets import ImageFolder, RandomSubset, save_images
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.options import DrawnAs
from sa_diffusers.families import family_defaults, get_family
from sa_diffusers.io.configuration import config_from_dict, layered
from sa_diffusers.report.pictures import to_pil
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig


NAMES = [str(digit) for digit in range(10)]


@pytest.fixture
def classifier(tmp_path) -> str:
    judge = DigitClassifier({"digit": NAMES}, accuracy={"digit": 0.9}, image_size=8, kernel_size=3, padding=1)
    judge.save_pretrained(tmp_path / "judge")
    return str(tmp_path / "judge")


@pytest.fixture
def pipeline() -> ConditionalVAEPipeline:
    return ConditionalVAEPipeline(ConditionalVAE(image_size=8, num_classes=10, hidden_sizes=(12, 8), latent_dim=2))


@pytest.fixture
def run(tmp_path, pipeline) -> str:
    """A run that forgot the 3."""
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"concept": "3", "after": {}}))
    return str(tmp_path / "run")


def pictures(folder, pixels: torch.Tensor, suffix: str = "png") -> str:
    """uint8 [N, 3, H, W] as files of a new folder."""
    folder.mkdir()
    for index, image in enumerate(pixels):
        to_pil(image).save(folder / f"{index:03d}.{suffix}")
    return str(folder)


def noise(count: int, size: int = 8, highest: int = 256) -> torch.Tensor:
    return torch.randint(0, highest, (count, 3, size, size)).byte()


def run_script(monkeypatch, capsys, *arguments: str) -> str:
    script.main(list(arguments))
    return capsys.readouterr().out


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "P"])
def test_images_are_read_as_they_are(tmp_path, mode):
    image = to_pil(noise(1, 6)[0]).resize((5, 6)).convert(mode)
    image.save(tmp_path / "image.png")
    found = read_image(tmp_path / "image.png")
    for row in range(6):
        for column in range(5):
            pixel = image.convert("RGB").getpixel((column, row))
            assert_close(found[:, row, column], torch.tensor([value / 127.5 - 1 for value in pixel]))
    assert found.shape == (3, 6, 5)
    if mode in ("L", "1", "LA"):
        assert found[0].equal(found[1]) and found[0].equal(found[2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_lies_behind_transparent_pixels_is_not_made_up(tmp_path, mode):
    image = to_pil(noise(1, 6)[0]).convert("RGBA")
    image.putpixel((2, 3), (9, 9, 9, 0))
    image.convert(mode).save(tmp_path / "image.png", **({"transparency": 0} if mode == "P" else {}))
    with pytest.raises(ValueError, match="image.png is transparent in part, with nothing behind it"):
        read_image(tmp_path / "image.png")


def test_deep_grey_and_broken_files_are_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got the mode F"):
        read_image(tmp_path / "deep.tiff")
    (tmp_path / "deep.tiff").unlink()
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match="broken.png is no readable image"):
        ImageFolder(tmp_path)


def test_the_images_of_a_folder_have_one_size(tmp_path):
    folder = pictures(tmp_path / "images", noise(3, 8), "webp")
    image = to_pil(noise(1, 12)[0]).resize((6, 8))
    image.save(tmp_path / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"got 8 x 8 \(height x width\) in .*000.webp and 8 x 6 .* --resolution"):
        ImageFolder(folder)
    cropped = ImageFolder(folder, resolution=4)
    assert (len(cropped), cropped.image_size) == (4, (4, 4))
    assert cropped.images([3, 0]).shape == (2, 3, 4, 4)


def test_a_turned_photograph_has_the_size_that_it_is_shown_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (6, 8)).save(tmp_path / "turned.jpg", exif=exif)
    folder = ImageFolder(tmp_path)
    assert folder.image_size == (6, 8) == tuple(folder.images([0]).shape[2:])


def test_a_random_subset(tmp_path):
    folder = ImageFolder(pictures(tmp_path / "images", noise(9)))
    subset, whole = RandomSubset(folder, 4, seed=0), folder.images(range(9))
    chosen = [next(i for i in range(9) if whole[i].equal(image)) for image in subset.images(range(4))]
    assert len(set(chosen)) == len(subset) == 4
    assert subset.images([2, 0]).equal(whole[[chosen[2], chosen[0]]])
    assert not RandomSubset(folder, 4, seed=1).images(range(4)).equal(subset.images(range(4)))
    with pytest.raises(ValueError, match="expected to choose 1 to 9 images"):
        RandomSubset(folder, 10, seed=0)


def test_saved_images_are_read_back(tmp_path):
    pixels = noise(5)
    source = ImageFolder(pictures(tmp_path / "images", pixels))
    save_images({"all": source, "some": RandomSubset(source, 2, 0)}, tmp_path / "new", batch_size=2)
    assert ImageFolder(tmp_path / "new" / "all").images(range(5)).equal(pixels.float() / 127.5 - 1)
    assert len(ImageFolder(tmp_path / "new" / "some")) == 2
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_images({"all": source}, tmp_path / "new")


def test_two_folders(tmp_path, classifier, monkeypatch, capsys):
    real, generated = noise(30), noise(24, highest=200)
    judge = DigitClassifier.from_pretrained(classifier).eval()
    with torch.no_grad():
        features = {
            "real": judge.features(real.float() / 127.5 - 1),
            "generated": judge.features(generated.float() / 127.5 - 1),
        }
    folders = pictures(tmp_path / "real", real), pictures(tmp_path / "generated", generated)
    output = tmp_path / "result.json"
    options = "--metrics fid,kid,is,prc --feature_batch_size 7 --num_splits 2 --num_neighbours 2"
    shown = run_script(
        monkeypatch, capsys, "images", "--real", folders[0], "--generated", folders[1], "--extractor", classifier,
        "--output", str(output), *options.split(),
    )  # fmt: skip
    result = json.loads(output.read_text())
    assert_close(result["frechet_distance"], frechet_distance(**features), rtol=1e-4, atol=1e-8)
    assert result["real"] == {"name": folders[0], "num_images": 30, "image_size": [8, 8], "left_out": None}
    assert result["extractor"] == {"name": classifier, "num_features": 50}
    assert (result["prc"]["real"], result["prc"]["generated"], result["prc"]["num_images"]) == (*folders, 24)
    assert "frechet_distance" in shown and "share of real images that lie among the generated ones" in shown
    assert "drawn with" not in shown and "over 100 subsets of 24\n" in shown
    assert {"kernel_distance", "classifier_score", "seconds", "options"} <= set(result)

    same = evaluate(FoldersConfig(real=folders[0], generated=folders[0], extractor=classifier))
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)
    expected = manifold_metrics(real=features["real"], generated=features["real"], k=3)
    assert [same["prc"][name] for name in ("precision", "recall", "density", "coverage")] == pytest.approx(
        [1, 1, expected["density"], 1]
    )


def test_the_kid_of_whole_folders_has_no_spread(tmp_path, classifier, monkeypatch, capsys):
    folders = [pictures(tmp_path / name, noise(12)) for name in ("real", "generated")]
    arguments = (
        "images",
        "--real",
        folders[0],
        "--generated",
        folders[1],
        "--extractor",
        classifier,
        "--metrics",
        "kid",
    )
    shown = run_script(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "whole.json"))
    assert json.loads((tmp_path / "whole.json").read_text())["kernel_distance"]["std"] is None
    assert "+- – over 100 subsets of 12, which are all images" in shown


def test_a_run_that_forgot_a_class(run, classifier, pipeline, tmp_path, monkeypatch, capsys):
    arguments = (
        "run", run, "--real", "digits8x8", "--split", "test", "--extractor", classifier, "--classifier", classifier,
        "--metrics", "fid,prc,classifier", "--num_images_per_class", "6", "--save_images", str(tmp_path / "saved"),
    )  # fmt: skip
    shown = run_script(monkeypatch, capsys, *arguments)
    result = json.loads((tmp_path / "run" / "evaluate.json").read_text())

    # What it must be, image by image.
    judge, family = DigitClassifier.from_pretrained(classifier).eval(), get_family(pipeline)
    drawn = {}
    for name in NAMES:
        latents = torch.cat([family.draw([Condition(name)], [derive_seed(0, "evaluate", name, i)]) for i in range(6)])
        drawn[name] = family.decode(latents)
    data = load_labelled_images("digits8x8", None, "test")
    retained = [name for name in NAMES if name != "3"]
    with torch.no_grad():
        read = {name: judge(images)["digit"].double().softmax(1) for name, images in drawn.items()}
        real = judge.features((2 * data.sample((data.labels != 3).nonzero()[:, 0]) - 1).expand(-1, 3, -1, -1))
        generated = judge.features(torch.cat([drawn[name] for name in retained]))
    own = {name: read[name][:, int(name)] for name in NAMES}
    right = {name: (read[name].argmax(1) == int(name)).double().mean().item() for name in retained}
    entropies = [-sum(p * math.log(p) for p in row) for row in read["3"].tolist()]

    found = result["classifier"]
    expected = {
        "concept_probability": own["3"].mean().item(),
        "concept_entropy": sum(entropies) / 6,
        "retained_accuracy": sum(right.values()) / 9,
        "retained_worst_accuracy": min(right.values()),
        "retained_probability": torch.cat([own[name] for name in retained]).mean().item(),
        "retained_worst_probability": min(own[name].mean().item() for name in retained),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["class_accuracy"] == pytest.approx(right)
    assert right[found["retained_worst_class"]] == min(right.values())
    assert found["classifier_accuracy"] == 0.9
    assert_close(result["frechet_distance"], frechet_distance(real=real, generated=generated), rtol=1e-4, atol=1e-8)
    assert (result["real"]["num_images"], result["real"]["left_out"]) == (int((data.labels != 3).sum()), "3")
    assert result["generated"]["num_images"] == 54
    assert result["run"] == {
        "forgotten": "3", "sampler": "dpmsolver++", "guidance_scale": 1.0, "num_inference_steps": 1,
        "num_images_per_class": 6,
    }  # fmt: skip
    assert "without '3'" in shown and "concept_entropy" in shown
    assert "drawn with: guidance_scale 1.0, num_inference_steps 1, sampler dpmsolver++\n" in shown

    saved = ImageFolder(tmp_path / "saved" / "forgotten").images(range(6))
    assert_close(saved, drawn["3"], rtol=0, atol=0.5 / 127.5 + 1e-6)
    assert len(ImageFolder(tmp_path / "saved" / "retained")) == 54
    with pytest.raises(SystemExit):
        run_script(monkeypatch, capsys, *arguments)  # the folder of images holds something now
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_a_base_run_without_a_class_that_another_run_forgot(run, classifier, tmp_path):
    (tmp_path / "run" / "metrics.json").unlink()
    options = {"run": run, "real": "digits8x8", "split": "test", "num_images_per_class": 2, "classifier": classifier}
    options |= {"extractor": classifier, "metrics": "fid,classifier", "num_real_images": 40}
    whole, part = evaluate(RunConfig(**options)), evaluate(RunConfig(**options, concept="3"))
    assert [result["generated"]["num_images"] for result in (whole, part)] == [20, 18]
    assert [result["real"]["left_out"] for result in (whole, part)] == [None, "3"]
    assert [result["real"]["num_images"] for result in (whole, part)] == [40, 40]
    assert whole["classifier"]["concept_probability"] is None
    assert 0 < part["classifier"]["concept_probability"] < 1
    with pytest.raises(ValueError, match="one of the classes 0, 1, .*, got 'dog'"):
        evaluate(RunConfig(**options, concept="dog"))


def test_the_classifier_alone_needs_no_real_images(run, classifier):
    config = RunConfig(run=run, metrics="classifier", classifier=classifier, num_images_per_class=3)
    result = evaluate(config)
    assert "real" not in result and "extractor" not in result
    assert evaluate(config)["classifier"] == result["classifier"]  # the same seeds draw the same images


def test_a_text_to_image_run(tiny_pipeline, classifier, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"num_inference_steps": 1, "guidance_scale": 2.0}))
    (tmp_path / "prompts.txt").write_text("a red seven\na blue one\na digit\n")
    real = pictures(tmp_path / "real", noise(5, 16))
    options = {"run": str(tmp_path / "run"), "real": real, "extractor": classifier, "metrics": "fid"}
    options["save_images"] = str(tmp_path / "saved")
    result = evaluate(RunConfig(**options, prompts=str(tmp_path / "prompts.txt")))
    assert (result["generated"]["num_images"], result["generated"]["image_size"]) == (3, [16, 16])
    assert (result["run"]["num_inference_steps"], result["run"]["guidance_scale"]) == (1, 2.0)
    assert result["frechet_distance"] > 0 and len(ImageFolder(tmp_path / "saved" / "drawn")) == 3
    with pytest.raises(ValueError, match="takes free text: expected --prompts"):
        evaluate(RunConfig(**options | {"save_images": None}))


def test_options_come_from_the_run_its_kind_or_the_command(run, tmp_path):
    def opened(**options):
        return open_run(RunConfig(run=run, metrics="fid", real="digits8x8", num_images_per_class=1, **options))

    assert opened().drawn_as == DrawnAs(1.0, 1, "dpmsolver++")  # of a conditional VAE
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"num_inference_steps": 7, "concept": "ignored"}))
    assert opened(guidance_scale=3.0).drawn_as == DrawnAs(3.0, 7, "dpmsolver++")
    assert (opened().forgotten, opened(concept="5").forgotten) == (["3"], ["5"])
    (tmp_path / "run" / "metrics.json").unlink()
    assert opened().forgotten == []  # not forgotten yet


def test_settings_come_from_another_run_where_they_are_not_given(run, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "base" / "pipeline")
    values = {"num_inference_steps": 7, "guidance_scale": 2.5, "sampler": "ddim"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))

    def opened(of: str, **options):
        common = {"metrics": "fid", "real": "digits8x8", "num_images_per_class": 1}
        return open_run(RunConfig(run=str(tmp_path / of), **common, **options))

    base, forgot = opened("base"), opened("run")
    found = opened("base", settings_of=run)
    assert base.drawn_as == DrawnAs(1.0, 1, "dpmsolver++")
    assert found.drawn_as == forgot.drawn_as == DrawnAs(2.5, 7, "ddim")
    assert found.forgotten == []  # the base run forgot nothing
    assert opened("base", settings_of=run, guidance_scale=4.0).drawn_as == DrawnAs(4.0, 7, "ddim")
    # the other way round: the settings of a base run are those of its kind, whatever the run says itself
    found = opened("run", settings_of=str(tmp_path / "base"))
    assert (found.drawn_as, found.forgotten) == (base.drawn_as, ["3"])


@pytest.mark.slow
def test_a_base_run_is_drawn_as_the_run_that_forgot_on_it(tiny_pipeline, classifier, tmp_path, monkeypatch, capsys):
    """Equal weights and equal settings give equal images, which the base run's own settings do not."""
    for name in ("base", "forgot"):
        tiny_pipeline().save_pretrained(tmp_path / name / "pipeline")
    config = {"num_inference_steps": 2, "guidance_scale": 3.0, "sampler": "ddim"}
    (tmp_path / "forgot" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "prompts.txt").write_text("a red seven\na blue one\n")
    real = pictures(tmp_path / "real", noise(5, 16))

    def evaluate_run(name: str, *options: str) -> str:
        return run_script(
            monkeypatch, capsys, "run", "--run", str(tmp_path / name), "--real", real, "--extractor", classifier,
            "--metrics", "fid", "--prompts", str(tmp_path / "prompts.txt"), *options,
        )  # fmt: skip

    drawn_with = "drawn with: guidance_scale 3.0, num_inference_steps 2, sampler ddim"
    other = str(tmp_path / "forgot")
    assert f"{drawn_with}\n" in evaluate_run("forgot")
    assert f"{drawn_with}; of {other} what was not given\n" in evaluate_run("base", "--settings_of", other)
    base, forgot = (json.loads((tmp_path / name / "evaluate.json").read_text()) for name in ("base", "forgot"))
    assert base["frechet_distance"] == forgot["frechet_distance"]
    assert base["run"] == forgot["run"] and base["options"]["settings_of"] == other
    shown = evaluate_run("base", "--num_inference_steps", "1")
    assert "drawn with: guidance_scale 7.5, num_inference_steps 1, sampler dpmsolver++\n" in shown
    other_settings = json.loads((tmp_path / "base" / "evaluate.json").read_text())
    assert other_settings["frechet_distance"] != forgot["frechet_distance"]


@pytest.mark.usefixtures("few_pictures")
def test_the_command_that_a_run_prints_judges_it(pipeline, classifier, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "base")
    options = config_from_dict(ForgetConfig, layered(ForgetConfig, family_defaults("ConditionalVAEPipeline"), {
        "model": str(tmp_path / "base"), "concept": "3", "surrogate": "noise", "output_dir": str(tmp_path / "forgot"),
        "num_samples": 20, "num_surrogate_samples": 4, "fisher_samples": 4, "num_train_steps": 1,
        "train_batch_size": 2, "eval_images_concept": 2, "eval_images_class": 1, "eval_images_other": 2,
        "classifier": [classifier],
    }))  # fmt: skip
    words = shlex.split(run_forgetting(options).commands["Judge more pictures of each class"])
    assert words[:3] == ["sa-diffusers", "evaluate", "run"]
    script.main([*words[2:], "--num_images_per_class", "3"])
    assert "concept_probability" in capsys.readouterr().out


def test_a_concept_is_a_class_by_any_of_its_names():
    assert forgotten_labels(["six", "seven"], "7, seven") == ["seven"]
    assert forgotten_labels(["six", "seven", "3"], "seven; 3") == ["seven", "3"]
    assert forgotten_labels(["six", "seven"], None) == []


@pytest.mark.usefixtures("few_pictures")
def test_a_run_that_forgot_several_classes_retains_none_of_them(run, classifier):
    (Path(run) / "metrics.json").write_text(json.dumps({"concept": "3; 8, eight", "after": {}}))
    options = {"real": "digits8x8", "extractor": classifier, "metrics": "fid,classifier", "classifier": classifier}
    found = evaluate(RunConfig(run=run, num_images_per_class=3, **options))
    assert found["run"]["forgotten"] == found["real"]["left_out"] == "3; 8"
    assert found["generated"]["num_images"] == 24
    assert set(found["classifier"]["class_accuracy"]) == {*NAMES} - {"3", "8"}
    assert 0 <= found["classifier"]["concept_probability"] <= 1


def test_wrong_input_is_refused_before_anything_is_drawn(run, classifier, tmp_path, monkeypatch):
    DigitClassifier({"digit": NAMES}, image_size=28).save_pretrained(tmp_path / "large")
    (tmp_path / "prompts.txt").write_text("a digit\n")
    monkeypatch.setattr("sa_diffusers.evaluation.drawing.draw_samples", None)  # calling it would raise
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    given = {"run": run, "real": "digits8x8", "extractor": classifier}
    for options, message in [
        ({"extractor": "inception"}, r'pip install "sa_diffusers\[fid\]"'),
        (
            {"metrics": "classifier", "classifier": str(tmp_path / "large")},
            "reads pictures of 28 pixels, the model .* 8",
        ),
        ({"prompts": str(tmp_path / "prompts.txt")}, "expected no --prompts"),
        ({"num_images_per_class": 1, "num_neighbours": 9}, "'prc' needs 10 images of each set .*, got 9"),
        ({"real": str(tmp_path / "nowhere")}, "expected a folder of images"),
        ({"save_images": run}, "expected a new or empty folder"),
        ({"settings_of": str(tmp_path)}, "expected the folder of a run, .* check --settings_of"),
        ({"attribute": "ink"}, "expected an attribute of the classifier"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            evaluate(RunConfig(**given | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"real": "b"}, "expected --run, the folder of a run"),
        ({"run": "a", "real": "b", "metrics": "fid,prd"}, "expected --metrics of fid, .*, got 'prd'"),
        ({"run": "a", "real": "b", "metrics": " , "}, "expected --metrics of fid"),
        ({"run": "a"}, "fid, prc: expected --real"),
        ({"run": "a", "metrics": "classifier"}, "both the metric classifier and --classifier"),
        ({"run": "a", "real": "b", "classifier": "c"}, "both the metric classifier and --classifier"),
        ({"run": "a", "real": "b", "num_images_per_class": 0}, "num_images_per_class >= 1, got 0"),
        ({"run": "a", "real": "b", "sample_batch_size": 0}, "sample_batch_size >= 1, got 0"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(RunConfig, options)


def test_the_command_is_named(monkeypatch, capsys):
    for words in ([], ["runs/0", "--real", "mnist"]):
        with pytest.raises(SystemExit) as error:
            script.main(words)
        assert error.value.code == 2 and "expected run, images, pipelines as the first word" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["images", "a", "b", "c"])
    assert "unknown argument 'c'" in capsys.readouterr().err
