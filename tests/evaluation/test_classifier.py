"""The attribute classifier: its file, its errors, its training, and whether the bundled one reads plain drawings."""

import itertools
import json
import random

import pytest
import torch
from PIL import Image

from sa_diffusers.core.concepts import Concept, Concepts
from sa_diffusers.core.objectives import Classification
from sa_diffusers.core.objectives.classification import disturb
from sa_diffusers.data.digits.captions import ATTRIBUTES, WORDS
from sa_diffusers.data.digits.images import colorize
from sa_diffusers.evaluation.examination import examination
from sa_diffusers.evaluation.forgetting import summarise
from sa_diffusers.evaluation.intervals import mean_interval, share_interval
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier, Score, entropies, score_images
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.io.bundled import resolve
from sa_diffusers.runs.base.classifier import ClassifierConfig, load_folder
from sa_diffusers.training.loop import TrainingConfig, train
from scripts import train_classifier


CLASSES = {"ink": ["red", "blue"], "background": ["black", "white", "gray"]}


@pytest.fixture
def classifier() -> AttributeClassifier:
    return AttributeClassifier(CLASSES, image_size=16, channels=(8, 8), num_features=12)


def test_save_and_load(classifier, tmp_path):
    classifier.register_to_config(accuracy={"ink": 0.5})
    classifier.save_pretrained(tmp_path)
    loaded = AttributeClassifier.from_pretrained(tmp_path)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    assert loaded.config.accuracy == {"ink": 0.5}
    assert loaded.config.attributes == CLASSES
    torch.testing.assert_close(loaded(images), classifier(images), rtol=0, atol=0)


def test_half_precision_file_loads_as_float32(classifier, tmp_path):
    classifier.half().save_pretrained(tmp_path)
    loaded = AttributeClassifier.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.dtype == torch.float32
    for name, weight in classifier.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.float(), rtol=0, atol=0)


def test_shapes_and_batches(classifier):
    images = torch.rand(7, 3, 16, 16) * 2 - 1
    assert classifier.features(images).shape == (7, 12)
    probabilities = classifier.probabilities(images, batch_size=3)
    assert {name: p.shape for name, p in probabilities.items()} == {"ink": (7, 2), "background": (7, 3)}
    for name, logits in classifier(images).items():
        torch.testing.assert_close(probabilities[name], logits.softmax(1).detach())


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(classifier, shape):
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 16, 16\]"):
        classifier.probabilities(torch.zeros(shape))


def test_no_images_are_refused(classifier):
    with pytest.raises(ValueError, match="at least one image"):
        classifier.probabilities(torch.zeros(0, 3, 16, 16))


def test_words_of_unknown_classes_are_refused():
    with pytest.raises(ValueError, match="expected words for the classes"):
        AttributeClassifier({"ink": ["red", "blue"]}, words={"ink": {"red": ["red"], "green": ["green"]}})


@pytest.mark.parametrize(
    ("phrasings", "expected"),
    [
        (["seven", "7"], ("digit", 7)),
        ([" Seven "], ("digit", 7)),
        (["GREY"], ("background", 1)),
        (["seven", "nine"], None),
        (["seven", "red"], None),
        (["seven", "unicorn"], None),
        ([], None),
    ],
)
def test_find_class(phrasings, expected):
    classes = {name: list(names) for name, names in ATTRIBUTES.items()}
    words = {name: {c: list(w) for c, w in by_class.items()} for name, by_class in WORDS.items()}
    assert AttributeClassifier(classes, words, channels=(8, 8)).find_class(phrasings) == expected


def test_find_class_without_words_knows_the_names(classifier):
    assert classifier.find_class(["White"]) == ("background", 1)


def test_score_counts_only_what_is_named(classifier):
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    guesses = [CLASSES["ink"][i] for i in classifier(images)["ink"].argmax(1)]
    wrong = [CLASSES["ink"][1 - i] for i in classifier(images)["ink"].argmax(1)]
    expected = [{"ink": guesses[0]}, {"ink": guesses[1]}, {}, {"ink": wrong[3]}, {}, {"ink": guesses[5]}]
    scores = score_images(classifier, images, expected)
    assert set(scores) == {"ink"}
    assert Score.total_of(scores["ink"].values()) == Score(right=3, total=4)


def test_score_refuses_what_it_cannot_judge(classifier):
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="got 2 for 1 images"):
        score_images(classifier, images, [{}, {}])
    with pytest.raises(ValueError, match="got 'green'"):
        score_images(classifier, images, [{"ink": "green"}])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe 1998, Table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval(right, total, low, high):
    assert Score(right, total).interval == pytest.approx((low, high), abs=5e-5)


class TestMeasuring:
    """The pictures of a prompt are alike here, so that twelve of four prompts tell no more than four."""

    @pytest.fixture
    def images(self) -> torch.Tensor:
        return (torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1).repeat(3, 1, 1, 1)

    def test_intervals_are_of_prompts(self, classifier, images):
        prompts, inks = [f"prompt {index % 4}" for index in range(12)], ["red", "red", "red", "blue"] * 3
        labels = [{"background": "gray", "ink": ink} for ink in inks]
        named = list(map(Candidate, prompts, labels))
        unnamed = [Candidate(prompt, {"ink": ink}) for prompt, ink in zip(prompts, inks, strict=True)]
        sets = {
            "concept": ("asks", named), "unseen": ("asks", named), "unnamed": ("open", unnamed),
            "retained": ("keeps", named),
        }  # fmt: skip
        sets = {name: PromptSet.seeded(purpose, part, lambda index: index) for name, (purpose, part) in sets.items()}
        judge = ClassifierJudge(classifier, "background", 2)
        read = {name: judge(images, part, None) for name, part in sets.items()}
        values, intervals = summarise("background", sets, read)
        read = classifier.probabilities(images)
        own, guesses = read["background"][:, 2], read["background"].argmax(1)
        inks_right = torch.tensor(
            [CLASSES["ink"][i] == ink for i, ink in zip(read["ink"].argmax(1), inks, strict=True)]
        )
        expected = {
            "concept_probability": own, "concept_probability_unseen": own, "concept_rate_when_unnamed": guesses == 2,
            "retained_accuracy": guesses == 2, "retained_worst_accuracy": guesses == 2, "retained_probability": own,
            "retained_worst_probability": own,
        }  # fmt: skip
        for name, each in expected.items():
            assert values[name] == pytest.approx(each.double().mean().item())
            assert intervals[name] == pytest.approx(share_interval(each.double(), prompts))
            alone = share_interval(each.double())
            assert intervals[name][1] - intervals[name][0] > 1.3 * (alone[1] - alone[0])
        for name in ("concept_attribute_accuracy", "attribute_accuracy"):
            assert values[name] == {"ink": pytest.approx(inks_right.double().mean().item())}
            assert intervals[name] == {"ink": pytest.approx(share_interval(inks_right.double(), prompts))}
        entropy = entropies(read["background"])
        assert intervals["concept_entropy"] == pytest.approx(mean_interval(entropy, groups=prompts))

    def test_names_of_classes_are_no_sample_of_prompts(self, classifier, images):
        labels = [{"background": name} for name in ("black", "white", "black", "white")] * 3
        named = [Candidate(label["background"], label) for label in labels]
        sets = {"retained": PromptSet.seeded("keeps", named, lambda index: index)}
        right = [CLASSES["background"].index(label["background"]) for label in labels]
        right = (classifier.probabilities(images)["background"].argmax(1) == torch.tensor(right)).double()
        read = {"retained": ClassifierJudge(classifier, "background", 2)(images, sets["retained"], None)}
        intervals = summarise("background", sets, read)[1]
        assert intervals["retained_accuracy"] == pytest.approx(share_interval(right))

    def test_labels_of_no_class_are_refused_before_anything_is_drawn(self, classifier):
        rows = [{"prompt": "a green digit", "ink": "green", "form": "seen"}]
        with pytest.raises(ValueError, match=r"knows ink as one of \['red', 'blue'\], got 'green' of 'a green digit'"):
            examination(
                ClassifierJudge(classifier, "ink", 0), Concepts([Concept(("red",), "blue")]), rows, 1, 1, 0, seed=0
            )


def solid_colours(step: int) -> dict:
    """Images of one colour: ink from the red channel, background from the brightness of the others."""
    rng = torch.Generator().manual_seed(step)
    ink, background = torch.randint(2, (16,), generator=rng), torch.randint(3, (16,), generator=rng)
    values = torch.stack([1.0 - 2 * ink, background - 1.0, background - 1.0], 1)
    return {"sample": values.view(-1, 3, 1, 1).expand(-1, 3, 16, 16), "labels": {"ink": ink, "background": background}}


def test_training_lowers_the_loss(classifier):
    config = TrainingConfig(num_train_steps=40, train_batch_size=16, learning_rate=1e-2, checkpointing_steps=None)
    history = train(classifier, Classification(), solid_colours, config, seed=0)
    assert history[0]["loss"] > 1
    assert history[-1]["loss"] < 0.3
    assert history[-1]["loss"] == pytest.approx(history[-1]["ink_loss"] + history[-1]["background_loss"], rel=1e-5)


def test_disturbance_is_drawn_for_half_of_the_images():
    images = torch.zeros(400, 3, 8, 8)
    drawn = Classification().draw({"sample": images}, torch.Generator().manual_seed(0))
    strength = drawn["noise"].flatten(1).std(1)
    assert 0.4 < (strength > 0).float().mean() < 0.6
    assert strength.max() < 0.3
    assert torch.equal(strength > 0, drawn["blur"] > 0)


def test_disturb_by_nothing_changes_nothing():
    images, none = torch.randn(2, 3, 8, 8), torch.zeros(2)
    identity = torch.eye(2, 3).expand(2, -1, -1)
    torch.testing.assert_close(disturb(images, identity, none, torch.zeros_like(images)), images)


def test_disturb_blurs_around_a_point():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 16
    blurred = disturb(image, torch.eye(2, 3)[None], torch.ones(1), torch.zeros_like(image))
    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    torch.testing.assert_close(blurred[0, 0, 1:4, 1:4], expected)


def test_bundled_classifier():
    classifier = AttributeClassifier.from_pretrained(resolve("bundled/digits/classifier"), dtype=torch.float32)
    assert {name: tuple(c) for name, c in classifier.config.attributes.items()} == ATTRIBUTES
    assert classifier.num_parameters() <= 350_000
    assert classifier.config.accuracy["digit"] >= 0.985
    assert min(classifier.config.accuracy.values()) == classifier.config.accuracy["digit"]


def test_bundled_classifier_reads_a_bar_as_a_one_in_every_colour():
    classifier = AttributeClassifier.from_pretrained(resolve("bundled/digits/classifier"), dtype=torch.float32)
    images, expected = [], []
    for ink, background, (stroke, columns) in itertools.product(
        ATTRIBUTES["ink"], ATTRIBUTES["background"], {"thin": slice(15, 17), "bold": slice(14, 18)}.items()
    ):
        coverage = torch.zeros(32, 32, dtype=torch.uint8)
        coverage[7:25, columns] = 255
        images.append(colorize(coverage, ink, background, random.Random(0)))
        expected.append({"digit": "one", "ink": ink, "background": background, "stroke": stroke})
    for by_class in score_images(classifier, torch.stack(images), expected).values():
        assert all(score.right == score.total for score in by_class.values())


def write_image_folder(folder, colours: dict[str, tuple[int, int, int]], count: int) -> None:
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for index, (name, rgb) in zip(range(count), itertools.cycle(colours.items())):
            Image.new("RGB", (24, 20), rgb).save(folder / f"{index}.png")
            print(json.dumps({"file_name": f"{index}.png", "colour": name}), file=file)


@pytest.mark.slow
def test_script_trains_on_an_image_folder(tmp_path, monkeypatch, capsys):
    write_image_folder(tmp_path / "images", {"red": (255, 0, 0), "blue": (0, 0, 255)}, count=40)
    options = "--attributes colour --resolution 16 --num_train_steps 30 --train_batch_size 8 --learning_rate 1e-2"
    folders = ["--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["train_classifier.py", *options.split(), *folders])
    train_classifier.main()
    assert "colour: 1.0000 of 4" in capsys.readouterr().out
    classifier = AttributeClassifier.from_pretrained(tmp_path / "run" / "classifier")
    assert classifier.config.attributes == {"colour": ["blue", "red"]}
    assert classifier.config.accuracy == {"colour": 1.0}


def test_classes_that_folders_name_have_these_names(tmp_path):
    for name, grey in (("dog", 20), ("cat", 200)):
        (tmp_path / name).mkdir()
        for index in range(12):
            Image.new("RGB", (20, 20), (grey,) * 3).save(tmp_path / name / f"{index}.png")
    train, test = load_folder(ClassifierConfig(data_dir=str(tmp_path), attributes="label", resolution=16))
    assert train.classes == test.classes == {"label": ["cat", "dog"]}
    for part in (train, test):
        bright = part.images(list(range(len(part)))).mean((1, 2, 3)) > 0
        assert bright.equal(part.labels["label"] == 0)


def test_script_names_a_missing_column(tmp_path):
    write_image_folder(tmp_path / "images", {"red": (255, 0, 0)}, count=10)
    config = ClassifierConfig(data_dir=str(tmp_path / "images"), attributes="colour,shape")
    with pytest.raises(ValueError, match=r"no column \['shape'\]"):
        load_folder(config)
