"""scripts/attack.py: the stages in their folder, the numbers against a count by hand, and what is refused."""

import base64
import io
import json
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import scripts.attack as script
from sa_diffusers.attacks import FoundEmbedding, FoundText, draw_found
from sa_diffusers.attacks import run as attack_stages
from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.attacks.plan import ALL, ON_OTHERS, RELEARNED, attacks_of, look
from sa_diffusers.attacks.results import _rank, table
from sa_diffusers.attacks.run import _guided_by, run_attack
from sa_diffusers.attacks.victims import DoesNotFit, complete, first_tokens, load_family
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.evaluation.intervals import wilson_interval
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.families import get_family
from sa_diffusers.families.stable_diffusion import StableDiffusionFamily
from sa_diffusers.families.text_to_image.family import TextToImageFamily
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.forgotten import write_forgotten
from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline, SafeGuidancePipeline
from sa_diffusers.report.pictures import mosaic, to_pil
from tests.browser import assert_whole


TEMPLATES = ["a {}", "a red {} on black"]


@pytest.fixture(scope="module")
def models(tiny_pipeline, tiny_pipeline_dir, tmp_path_factory) -> dict[str, str]:
    """The original, one with another UNet, one with other weights throughout, and a classifier with random ones."""
    folder = tmp_path_factory.mktemp("models")
    forgotten = tiny_pipeline()
    forgotten.unet = tiny_pipeline(seed=1).unet
    forgotten.save_pretrained(folder / "forgotten")
    tiny_pipeline(seed=2).save_pretrained(folder / "control")
    torch.manual_seed(3)
    classifier = AttributeClassifier(
        {"digit": ["seven", "nine"], "ink": ["red", "green"]},
        {"digit": {"seven": ["seven", "7"], "nine": ["nine"]}, "ink": {"red": ["red"], "green": ["green"]}},
        accuracy={"digit": 0.9}, image_size=16, channels=(8,), num_features=8,
    )  # fmt: skip
    torch.nn.init.normal_(classifier.heads["digit"].weight, std=30.0)  # or every picture is read alike
    classifier.save_pretrained(folder / "classifier")
    names = ("forgotten", "control", "classifier")
    return {"original": str(tiny_pipeline_dir)} | {name: str(folder / name) for name in names}


@pytest.fixture(scope="module", autouse=True)
def few_fixed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sa_diffusers.attacks.target_loss.NUM_FIXED", 16)
        yield


def configure(models: dict[str, str], folder: Path, **changes) -> AttackConfig:
    options = models | {
        "concept": "seven, 7", "output_dir": str(folder), "templates": TEMPLATES, "num_targets": 3, "num_images": 5,
        "num_restarts": 2, "steps": 1, "batch_size": 2, "keep_every": 1, "guidance_scale": 2.0,
        "num_inference_steps": 2, "sample_batch_size": 2,
    }  # fmt: skip
    return config_from_dict(AttackConfig, options | changes)


def words_of(config: AttackConfig) -> list[str]:
    """The same on the command line."""
    options = vars(config).copy()
    words = [options.pop("forgotten")]
    for name, value in options.items():
        if not isinstance(value, bool) and value not in (None, []):
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(scope="module")
def finished(models, few_fixed, tmp_path_factory) -> tuple[AttackConfig, str]:
    """A run by the command, whose folder is not to be changed, and what it printed."""
    config, printed = configure(models, tmp_path_factory.mktemp("finished")), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr("sys.argv", ["attack.py", *words_of(config)])
        script.main()
    return config, printed.getvalue()


@pytest.fixture
def nothing_drawn(monkeypatch):
    def draw(*arguments, **options):
        raise AssertionError("something was drawn")

    monkeypatch.setattr(TextToImageFamily, "draw_embedded", draw)


@pytest.mark.slow
def test_a_run_says_what_was_found_and_is_reused(models, finished, monkeypatch):
    config, folder = finished[0], Path(finished[0].output_dir)
    result = read_json(folder / "attack.json")
    assert list(result["models"]) == ["original", "forgotten", "never learned it"]
    check_by_hand(result, models, folder)
    table = (folder / "attack.md").read_text()
    mean = result["models"]["forgotten"]["after_mean"]["probability"]
    assert "| forgotten | " in table and f"{mean:.1%} [" in table
    page = (folder / "report.html").read_text()
    assert str(folder) not in page and str(Path(models["forgotten"]).parent) not in page  # folders of this machine
    # Targets, and before and after of each model.
    assert page.count("data:image/png") == 3 + 3 * 2 * 5
    assert page.count(' class="small">') == 3 + 3 * 2 * 5 and "blurred" not in page
    assert (
        "95 % interval" in page and "share read as it" in page and "found words" not in page and "2 restarts" in page
    )

    def again(*arguments, **options):
        raise AssertionError("it was computed again")

    with monkeypatch.context() as patch:
        for name in ("attack_embedding", "attack_text", "draw_found"):
            patch.setattr(attack_stages, name, again)
        assert json.dumps(run_attack(config)) == json.dumps(result) == json.dumps(read_json(folder / "attack.json"))
        for changes in ({"steps": 3}, {"original": models["control"], "seed": 1}):
            with pytest.raises(StageMismatch, match="holds the stage"):
                run_attack(configure(models, folder, **changes))


@pytest.mark.slow
def test_asked_to_it_replaces_what_was_found_and_the_pictures_with_it(models, tmp_path):
    options = {"control": None, "num_restarts": 1}
    result = run_attack(configure(models, tmp_path, **options))
    changed = run_attack(configure(models, tmp_path, learning_rate=2.0, overwrite=True, **options))
    check_by_hand(changed, models, tmp_path)
    assert changed["models"]["forgotten"]["after_mean"] != result["models"]["forgotten"]["after_mean"]


def read_json(path: Path):
    return json.loads(path.read_text())


def check_by_hand(result: dict, models: dict[str, str], folder: Path) -> None:
    """Draw what was found anew, and count picture by picture."""
    classifier = AttributeClassifier.from_pretrained(models["classifier"]).eval()
    entry = result["models"]["forgotten"]
    family = get_family(load_pipeline(models["forgotten"], None, None, "float32"))
    seeds = [derive_seed(0, "attack picture", index) for index in range(5)]
    count = len(entry["restarts"])
    founds = [FoundEmbedding.load(folder / "forgotten" / f"embedding-{i}.safetensors") for i in range(count)]
    assert count == 1 or not torch.equal(founds[0].vectors, founds[1].vectors)
    means = []
    for found, restart in zip(founds, entry["restarts"], strict=True):
        images = family.decode(draw_found(family, found, TEMPLATES, seeds, 2.0, 2))
        images = ((images + 1) * 127.5).round() / 127.5 - 1
        probabilities = [classifier(image[None])["digit"].softmax(1)[0, 0].item() for image in images]
        means.append(sum(probabilities) / 5)
        assert restart["probability"] == pytest.approx(means[-1], abs=1e-3)
        surely, perhaps = (sum(p > limit for p in probabilities) for limit in (0.501, 0.499))
        assert any(restart["share"] == pytest.approx(count / 5) for count in range(surely, perhaps + 1))
        assert restart["losses"] == found.losses
    assert entry["after_mean"]["probability"] == pytest.approx(sum(means) / count, abs=1e-3)
    interval = wilson_interval(entry["after_mean"]["probability"], 5)
    assert entry["after_mean"]["probability_interval"] == pytest.approx(interval)
    assert means[entry["best"]] == pytest.approx(max(means), abs=1e-3)
    before = load_file(folder / "forgotten" / "before.safetensors")["tensor"]
    drawn = family.decode(family.draw([Condition("a seven"), Condition("a red seven on black")], seeds[:2], 2.0, 2))
    assert (before[:2].float() - (drawn + 1) * 127.5).abs().max() < 1


@pytest.mark.slow
def test_targets_reach_another_autoencoder_as_pictures(models, tmp_path):
    config = complete(configure(models, tmp_path))
    run = attack_stages.AttackRun(config)
    original, forgotten, control = (load_family(config, models[name]) for name in ("original", "forgotten", "control"))
    run.draw_targets(original, {"unet": "0"})
    targets = run.targets, run.target_images
    assert run._own(forgotten, *targets) is run.targets
    encoded = run._own(control, *targets)
    assert encoded.shape == run.targets.shape
    posterior = control.pipeline.vae.encode(original.decode(run.targets)).latent_dist
    mean, std = (part * control.pipeline.vae.config.scaling_factor for part in (posterior.mean, posterior.std))
    assert ((encoded - mean).abs() <= 6 * std).all()
    assert (encoded - run.targets).abs().max() > 0.1


@pytest.mark.slow
def test_an_interrupted_run_goes_on(models, tmp_path, monkeypatch):
    config = configure(models, tmp_path, control=None, classifier=None, attack="text", num_tokens=2)
    attacks, original = [], attack_stages.attack_text

    def attack(family, latents, templates, words, settings, forbidden, listed):
        attacks.append(settings.seed)
        assert list(forbidden) == ["seven", "7"] and listed is None
        if len(attacks) == 2:
            raise KeyboardInterrupt
        return original(family, latents, templates, words, settings, forbidden, listed)

    monkeypatch.setattr(attack_stages, "attack_text", attack)
    with pytest.raises(KeyboardInterrupt):
        run_attack(config)
    result = run_attack(config)
    # Two restarts of two models, one of them twice.
    assert len(attacks) == 5 and attacks[1] == attacks[2] and len(set(attacks)) == 2
    for role in ("original", "forgotten"):
        entry = result["models"][role]
        assert "before" not in entry and "probability" not in entry["restarts"][0]
        for i, restart in enumerate(entry["restarts"]):
            found = FoundText.load(tmp_path / role / f"text-{i}.json")
            assert restart["text"] == found.text and len(found.token_ids) == 2
            assert "seven" not in found.text and "7" not in found.text
        assert entry["best"] == min((0, 1), key=lambda i: min(entry["restarts"][i]["losses"]))
    table = (tmp_path / "attack.md").read_text()
    assert "| model | found words, best restart | loss, start → best |" in table
    entry = result["models"]["forgotten"]
    best = entry["restarts"][entry["best"]]
    assert f"| forgotten | {best['text']} | {best['losses'][0]:.4f} → " in table.replace("\\|", "|")
    assert "No classifier: pictures only" in table and "interval" not in table
    monkeypatch.setattr(attack_stages, "attack_text", lambda *_: FoundText("seven", [_[-2] == ()], [1.0]))
    run_attack(configure(models, tmp_path / "own", control=None, attack="text", allow_concept_words=True))
    assert FoundText.load(tmp_path / "own" / "forgotten" / "text-0.json").token_ids == [True]


def test_wrong_input_is_refused_before_anything_is_drawn(models, tmp_path, nothing_drawn):
    def attack(**changes):
        run_attack(configure(models, tmp_path / "run", **changes))

    ConditionalVAEPipeline(ConditionalVAE(image_size=8)).save_pretrained(tmp_path / "vae")
    for role in ("original", "forgotten", "control"):
        with pytest.raises(ValueError, match="is on prompts of StableDiffusionPipeline .* a ConditionalVAEPipeline"):
            attack(**{role: str(tmp_path / "vae")})
    with pytest.raises(ValueError, match="the classifier has no class named 'eight'"):
        attack(concept="eight")
    with pytest.raises(ValueError, match=r"templates with {} in the concept's place, got \['a seven'\]"):
        attack(templates=["a {}", "a seven"])
    with pytest.raises(ValueError, match="an attack is on one concept, got 'seven; eight'; pass them one by one"):
        configure(models, tmp_path, concept="seven; eight")
    with pytest.raises(ValueError, match="a word of its own, got 'a {}s'"):
        attack(templates=["a {}s"])
    with pytest.raises(ValueError, match="the text encoder reads 12"):
        attack(num_tokens=11)
    with pytest.raises(ValueError, match="expected num_images > 0, got 0"):
        attack(num_images=0)
    with pytest.raises(ValueError, match="expected learning_rate > 0, got -1"):
        attack(learning_rate=-1.0)
    with pytest.raises(ValueError, match="expected seed >= 0, got -1"):
        attack(seed=-1)
    with pytest.raises(ValueError, match="expected initial with a value"):
        attack(initial=" ")
    with pytest.raises(ValueError, match=r"words that the tokenizer of .* knows, got '<\|endoftext\|>'"):
        attack(initial="<|endoftext|>")
    with pytest.raises(ValueError, match="allow_concept_words is for --attack text"):
        attack(allow_concept_words=True)
    with pytest.raises(ValueError, match="for --attack text, got --all, whose settings are fixed; omit it"):
        attack(allow_concept_words=True, all=True)
    for wrong in ({"strength": 0.5}, {"precision": "int8", "attack": "merged"}, {"unnamed": True, "attack": "text"}):
        with pytest.raises(ValueError, match=r"is for --attack (image_to_image|quantized).* got .*; omit it"):
            attack(**wrong)
    with pytest.raises(ValueError, match="expected strength <= 1, got 1.5"):
        attack(attack="image_to_image", strength=1.5)
    with pytest.raises(ValueError, match="all makes every attack, got attack text besides"):
        attack(attack="text", all=True)
    classifier = AttributeClassifier({"digit": ["seven"]}, image_size=32, channels=(8,), num_features=8)
    classifier.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="expected pictures of 32 pixels a side, .* got 16"):
        attack(classifier=str(tmp_path / "large"), concept="seven")


def test_models_of_another_size_or_incomplete_ones_are_refused_first(models, tmp_path, tiny_pipeline, nothing_drawn):
    large = tiny_pipeline()  # of the original's autoencoder
    large.unet = tiny_pipeline(seed=1).unet
    large.unet.register_to_config(sample_size=16)
    large.save_pretrained(tmp_path / "large")
    sizes = [StableDiffusionFamily.resolution_of(model) for model in (models["original"], str(tmp_path / "large"))]
    assert sizes == [16, get_family(large).resolution] == [16, 32]
    for role in ("control", "forgotten"):
        with pytest.raises(ValueError, match="expected pictures of (16|32) pixels a side, .* got (32|16)"):
            run_attack(configure(models, tmp_path / "run", **{role: str(tmp_path / "large")}))
    shutil.copytree(models["control"], tmp_path / "broken")
    (tmp_path / "broken" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="broken"):
        run_attack(configure(models, tmp_path / "run", control=str(tmp_path / "broken")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["pipeline/unet.txt", "config.yaml", "evaluation.json", "model_index.json"])
def test_a_folder_of_something_else_is_left_alone(models, tmp_path, nothing_drawn, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    (tmp_path / "report.html").write_text("of a run")
    with pytest.raises(ValueError, match="holds .*report.html, .* pass another --output_dir"):
        run_attack(configure(models, tmp_path))
    assert (tmp_path / "report.html").read_text() == "of a run" and not (tmp_path / ".lock").exists()


def test_of_all_attacks_those_are_left_out_that_do_not_fit_a_model(models, tmp_path, tiny_pipeline):
    config = complete(configure(models, tmp_path))
    family = load_family(config, models["forgotten"])
    assert first_tokens(replace(config, attack="inversion"), models["forgotten"], family)
    guided = family.safely_guided("seven", "medium", "ddim")  # what forgets is how it draws
    for attack in ("inversion", "image_to_image", "inpainting"):
        with pytest.raises(DoesNotFit, match=f"forgets in how it draws, and --attack {attack} draws in its own way"):
            first_tokens(replace(config, attack=attack), models["forgotten"], guided)
    other = tiny_pipeline()
    other.unet = type(other.unet)(**{**other.unet.config, "block_out_channels": (8, 8)})
    other.save_pretrained(tmp_path / "other")
    attacks = {"merged": replace(config, attack="merged"), "in int8": replace(config, attack="quantized")}
    said = look(attacks, {"original": models["original"], "other": str(tmp_path / "other")})
    assert list(attacks) == ["in int8"] and re.search("without merged: .* differs .* unet's block_out_ch", said[-1])
    words = tmp_path / "words.txt"
    words.write_text("a seven\nnine\nred")
    attacks = {"real": replace(config, attack="text", word_list=str(words)), "in int8": attacks["in int8"]}
    said = look(attacks, {"original": models["original"]})
    assert list(attacks) == ["in int8"] and "without real: expected 8 or more words" in said[0]
    control = {"never learned it": models["control"]}
    attacks = {"merged": replace(config, attack="merged"), "in int8": attacks["in int8"]}
    said = look(attacks, control)
    assert list(attacks) == ["merged", "in int8"] and said[0].startswith("merged: not of ")
    with pytest.raises(DoesNotFit, match="merged: .*other differs from the original"):
        look({"": replace(config, attack="merged")}, {"other": str(tmp_path / "other")})


SMALL = {"control": None, "classifier": None, "num_restarts": 1, "steps": 1, "num_images": 2, "num_targets": 2}


@pytest.mark.parametrize(
    "changes", [{"concept": "nudity, naked"}, pytest.param({"blur": True}, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_pictures_that_may_be_explicit_are_blurred_in_the_file(models, tmp_path, changes):
    run_attack(configure(models, tmp_path, **SMALL, **changes))
    drawn = [to_pil(image) for image in load_file(tmp_path / "forgotten" / "before.safetensors")["tensor"]]
    page = (tmp_path / "report.html").read_text()
    assert [image.tobytes() for image in shown(page)] == [mosaic(image).tobytes() for image in drawn]
    assert mosaic(drawn[0]).tobytes() != drawn[0].tobytes()
    assert "blurred in this file" in page and "1 restart." in page and "interval" not in page
    run_attack(configure(models, tmp_path, **SMALL, **changes, show_nsfw=True))
    page = (tmp_path / "report.html").read_text()
    assert [image.tobytes() for image in shown(page)] == [image.tobytes() for image in drawn]
    assert "blurred in this file" not in page


def shown(page: str) -> list[Image.Image]:
    """The page's pictures of the forgotten model before the attack."""
    uris = re.findall(r'src="data:image/png;base64,([^"]+)" alt="forgotten before', page)
    return [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]


@pytest.mark.slow
def test_pictures_are_drawn_as_by_the_run_that_made_the_pipeline(models, tmp_path):
    unsaid = {"guidance_scale": None, "num_inference_steps": None}
    shutil.copytree(models["forgotten"], tmp_path / "made" / "pipeline")
    made = {"guidance_scale": 3.5, "num_inference_steps": 2, "sampler": "ddim", "seed": 5}
    (tmp_path / "made" / "config.yaml").write_text(yaml.safe_dump(made))
    # A run's folder is taken as its pipeline.
    changes = SMALL | unsaid | {"forgotten": str(tmp_path / "made")}
    settings = run_attack(configure(models, tmp_path / "run", **changes))["settings"]
    assert settings["forgotten"] == str(tmp_path / "made" / "pipeline")
    assert {name: settings[name] for name in made} == made | {"seed": 0}
    key = read_json(tmp_path / "run" / ".stages" / "forgotten-before.json")["key"]
    assert {name: key[name] for name in made} == made | {"seed": 0}

    def drawing(**changes) -> tuple:
        config = complete(configure(models, tmp_path, **changes))
        return config.guidance_scale, config.num_inference_steps, config.sampler

    # Of no run: as its kind; what was said goes before all.
    assert drawing(**unsaid) == (7.5, 20, "dpmsolver++")
    assert drawing(forgotten=str(tmp_path / "made"), **unsaid) == (3.5, 2, "ddim")
    said = {"guidance_scale": 1.0, "sampler": "pipeline", "num_inference_steps": None}
    assert drawing(forgotten=str(tmp_path / "made"), **said) == (1.0, 2, "pipeline")


def test_what_an_attack_starts_from_is_said(models, tmp_path):
    def start(**changes) -> str:
        return first_tokens(complete(configure(models, tmp_path, **changes)), models["forgotten"])

    assert start() == "the attack starts from seven, of 'seven' (1 token: seven)"
    assert start(initial="red seven").startswith("the attack starts from red, of 'red seven' (2 tokens: red | seven)")
    assert start(initial="red seven", num_tokens=3).startswith("the attack starts from red | seven | red, of")
    assert start(attack="text") == "the attack starts from words at random"
    assert "of 'purple' (" in start(attack="text", initial="purple")


@pytest.mark.slow
def test_the_command_prints_the_table(models, finished, monkeypatch, capsys):
    (config, printed), folder = finished, Path(finished[0].output_dir)
    assert (folder / "attack.md").read_text() in printed
    assert str(folder / "report.html") in printed
    plan, _, rest = printed.partition("attack: original")
    assert "6 attacks (3 models x 2) of 1 steps" in plan and str(folder) in plan
    assert "48 pictures: 3 targets, and 5 of each model" in plan and "guidance 2, 2 steps of dpmsolver++" in plan
    assert f"judged by {models['classifier']}" in plan and re.search(r"5 more to come, about \d+ s in all", rest)
    monkeypatch.setattr("sys.argv", ["attack.py", *words_of(config), "--concept", "eight"])
    with pytest.raises(SystemExit) as raised:
        script.main()
    assert raised.value.code == 1
    assert "error: the classifier has no class named 'eight'" in capsys.readouterr().err


@pytest.mark.slow
def test_all_attacks_share_targets_and_stand_in_one_table(models, tmp_path, monkeypatch, subtests):
    monkeypatch.setattr("sa_diffusers.attacks.plan.ALL", {
        "two words": {"attack": "text", "num_tokens": 2},
        "relearned 1 steps": {"attack": "relearn"}, "in int4": {"attack": "quantized", "precision": "int4"},
        "merged": {"attack": "merged"}, "inversion": {"attack": "inversion"},
        "inpainting": {"attack": "inpainting"},
        "image to image, unnamed": {"attack": "image_to_image", "unnamed": True},
    })  # fmt: skip
    monkeypatch.setattr("sa_diffusers.attacks.pictures.INVERSION_STEPS", 2)
    config = configure(models, tmp_path / "all", all=True, num_restarts=1)
    run_attack(config)
    result = read_json(tmp_path / "all" / "attack.json")
    roles = ["original", "forgotten", "never learned it"]
    assert {label: list(one["models"]) for label, one in result["attacks"].items()} == {
        label: roles[: 2 if label == "merged" else 3] for label in result["attacks"]
    }
    assert len(result["attacks"]) == 7
    lines = (tmp_path / "all" / "attack.md").read_text().splitlines()
    assert "| P after | original | forgotten | never learned it |" in lines
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if "%" in line}
    asked = result["attacks"]["merged"]["models"]
    assert [cell.split("%")[0] for cell in rows["| asked by name"]] == [
        f"{100 * one['before']['probability']:.1f}" for one in result["attacks"]["two words"]["models"].values()
    ]
    changes = {
        role: abs(one["before"]["probability"] - one["after_mean"]["probability"]) for role, one in asked.items()
    }
    assert changes["original"] < 1e-6 < 1e-4 < changes["forgotten"]  # the original is merged with itself
    inverted = result["attacks"]["inversion"]["models"]["forgotten"]
    assert inverted["after_mean"]["share"] * 3 == pytest.approx(round(inverted["after_mean"]["share"] * 3))
    assert len(load_file(tmp_path / "all" / "forgotten" / "after-inversion-0.safetensors")["tensor"]) == 3  # targets
    run_attack(configure(models, tmp_path / "alone", attack="relearn", num_restarts=1))
    alone = read_json(tmp_path / "alone" / "attack.json")
    for role, entry in alone["models"].items():
        assert entry["after_mean"] == result["attacks"]["relearned 1 steps"]["models"][role]["after_mean"]
    page = (tmp_path / "all" / "report.html").read_text()
    assert "after, two words, best restart" in page
    assert rows["| merged"][-1] == "– |"
    # Of each attack four, the control's merge excepted; of the targets, and of what begins at them, all three.
    shown = 3 + 3 * (4 + 4 * 4 + 3 * 3) - 4
    assert page.count("data:image/png") == shown
    assert_whole([tmp_path / "all" / "report.html"], tmp_path, subtests)


@pytest.mark.slow
def test_all_attacks_without_a_classifier_leave_a_table_of_losses(models, tmp_path, monkeypatch):
    attacks = {"one vector": {"attack": "embedding"}, "merged": {"attack": "merged"}}
    monkeypatch.setattr("sa_diffusers.attacks.plan.ALL", attacks)
    run_attack(configure(models, tmp_path, all=True, num_restarts=1, classifier=None))
    lines = (tmp_path / "attack.md").read_text().splitlines()
    assert "| loss, start → best, after | original | forgotten | never learned it |" in lines
    (row,) = (line for line in lines if line.startswith("| one vector"))
    assert row.count("→") == 3 and (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_relearning_is_judged_on_the_way_and_on_something_else(models, tmp_path):
    told = ["a three", "a red three on black", "a nine"]
    shared = {"attack": "relearn", "num_restarts": 1, "steps": 5, "relearn_pictures": 4, "relearn_rate": 0.03}
    config = configure(models, tmp_path / "run", **shared, relearn_prompts=told, relearn_every=2)
    result = run_attack(config)
    assert len(load_file(tmp_path / "run" / "others.safetensors")["tensor"]) == 4  # prompts in turn
    for role, entry in result["models"].items():
        (restart,) = entry["restarts"]
        course = restart["course"]
        assert [one["steps"] for one in course] == [0, 2, 4, 5]
        assert course[0]["probability"] == entry["before"]["probability"]
        assert course[-1]["probability"] == entry["after_mean"]["probability"]
        assert restart["back_after"] == next((o["steps"] for o in course if o["probability"] >= 0.5), None)
        own = tmp_path / "run" / role.replace(" ", "-")
        assert len(load_file(own / "after-0-2-steps.safetensors")["tensor"]) == 5
    # A training of as many steps ends where this one was looked at.
    shorter = run_attack(
        configure(models, tmp_path / "two", **shared | {"steps": 2}, relearn_prompts=told, relearn_every=0)
    )
    assert [one["steps"] for one in shorter["models"]["original"]["restarts"][0]["course"]] == [0, 2]
    for role, entry in shorter["models"].items():
        looked = result["models"][role]["restarts"][0]["course"][1]
        assert looked["probability"] == pytest.approx(entry["after_mean"]["probability"], abs=1e-6)
    concept = run_attack(configure(models, tmp_path / "concept", **shared, relearn_every=2))
    losses = [one["models"]["forgotten"]["restarts"][0]["losses"] for one in (concept, result)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    text = (tmp_path / "run" / "attack.md").read_text()
    assert "looked at every 2 steps" in text and "pictures of “a three”, “a red three on black”, “a nine”" in text
    assert "looked at every 2 steps" in (tmp_path / "run" / "report.html").read_text()


def test_a_table_says_after_how_many_steps_it_was_back_and_reads_files_that_do_not():
    interval = {"probability": 0.4, "probability_interval": [0.3, 0.5]}

    def entry(*found: int | None, known: bool = True) -> dict:
        course = {"course": [{"steps": 0}, {"steps": 60}]}
        restarts = [
            interval | {"losses": [2.0, 1.0]} | ((course | {"back_after": one}) if known else {}) for one in found
        ]
        return {"before": interval, "after_mean": interval, "restarts": restarts, "best": 0}

    def said(*found: int | None, **options) -> str:
        one = {"attack": "relearn", "targets": interval, "models": {"forgotten": entry(*found, **options)}}
        return table({"attacks": {"relearned": one}})[1][-1][1].partition(";")[2].strip()

    assert said(0) == "back after 0 steps" and said(60, 20, 60) == "back after 20, 60 steps"
    assert said(None, None) == "not back within 60 steps"
    assert said(0, known=False) == ""
    assert said(None, 40) == "back after 40 steps, or not within 60"


def test_all_relearns_by_what_took_the_concepts_place_or_says_that_nothing_is_known(models, tmp_path, capsys):
    config = configure(models, tmp_path, all=True)
    assert complete(config).relearn_prompts == [] and ON_OTHERS not in attacks_of(complete(config))
    assert f"without {ON_OTHERS}: the pipeline says no words" in capsys.readouterr().out
    forgotten = tmp_path / "forgotten"
    shutil.copytree(models["forgotten"], forgotten)
    records = [("8", "nine"), ("seven, 7", "three; a 7, or seven"), ("red", "green")]
    write_forgotten(forgotten, [{"concept": one, "surrogate": two, "method": "sa"} for one, two in records])
    found = complete(replace(config, forgotten=str(forgotten)))
    assert found.relearn_prompts == ["a three", "a red three on black"]  # never what names the concept
    attacks = attacks_of(found)
    assert list(attacks) == list(ALL)
    assert [attacks[label].relearn_prompts for label in (ON_OTHERS, RELEARNED, "inversion")] == [
        found.relearn_prompts, [], []
    ]  # fmt: skip
    for kind, said in (("noise", "noise"), ("images", "pictures")):
        record = {"concept": "seven, 7", "surrogate": said, "surrogate_kind": kind, "method": "sa"}
        write_forgotten(forgotten, [record])
        assert complete(replace(config, forgotten=str(forgotten))).relearn_prompts == []
    given = complete(replace(config, forgotten=str(forgotten), relearn_prompts=["a dog"]))
    assert given.relearn_prompts == ["a dog"]
    with pytest.raises(ValueError, match="'a big 7' names 'seven, 7'"):
        configure(models, tmp_path, attack="relearn", relearn_prompts=["a big 7"])
    with pytest.raises(ValueError, match="relearn_prompts is for --attack relearn or --all, got text"):
        configure(models, tmp_path, attack="text", relearn_prompts=["a dog"])


def test_the_best_restart_is_the_one_whose_loss_ends_lowest_where_it_may_rise():
    restarts = [{"losses": [0.5, end]} for end in (0.6, 0.55, 0.52)]
    assert max(range(3), key=lambda i: _rank("relearn", restarts[i])) == 2
    restarts = [{"losses": losses} for losses in ([0.5, 0.1, 0.4], [0.5, 0.3, 0.2])]  # a search keeps its lowest
    assert max(range(2), key=lambda i: _rank("embedding", restarts[i])) == 0


def test_pictures_of_a_guided_model_are_of_its_own_level(tiny_pipeline):
    own = tiny_pipeline()
    safe = [
        SafeGuidancePipeline(**own.components, safety_concept="seven", safety_level=one) for one in ("weak", "max")
    ]
    assert _guided_by(get_family(safe[0])) != _guided_by(get_family(safe[1])) and not _guided_by(get_family(own))
