"""The digit classifier: the authors' network layer by layer, its file, its sizes, its training by the script."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sa_diffusers.cli.parse import parse_config
from sa_diffusers.data.labelled_images import load_labelled_images
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.runs.base.classifier import ClassifierConfig, digit_words, load_examples, make_classifier
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig
from scripts import train_classifier


CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [str(digit) for digit in range(10)]
SMALL = {"image_size": 8, "kernel_size": 3, "padding": 1, "channels": (4, 6), "num_features": 5}


def digit_classifier(**options) -> DigitClassifier:
    """With normalisation that does something, unlike that of a new model in eval mode."""
    classifier = DigitClassifier({"digit": NAMES}, {"digit": digit_words(NAMES)}, **options)
    for norm in (classifier.norm1, classifier.norm2):
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
    return classifier.eval()


@pytest.mark.parametrize("training", [False, True])
def test_it_is_the_authors_network(training):
    """Written down as a list of layers; in training mode too, where dropout drops the same from the same state."""
    authors = nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.BatchNorm2d(10), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.BatchNorm2d(20), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 10),
    )  # fmt: skip
    classifier = digit_classifier()
    weights = dict(zip(authors.state_dict(), classifier.state_dict().values(), strict=True))
    authors.load_state_dict(weights)
    grey = torch.rand(6, 1, 28, 28)
    answers = []
    for network, images in ((authors, grey), (classifier, (2 * grey - 1).expand(-1, 3, -1, -1))):
        torch.manual_seed(0)
        answers.append(network.train(training)(images))
    torch.testing.assert_close(answers[1], {"digit": answers[0]})


def test_it_reads_the_mean_of_the_channels():
    classifier, images = digit_classifier(**SMALL), torch.rand(3, 3, 8, 8) * 2 - 1
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(classifier(images), classifier(grey))


@pytest.mark.parametrize("training", [False, True])
def test_probabilities_are_those_of_eval_mode(training):
    classifier, images = digit_classifier(**SMALL), torch.rand(7, 3, 8, 8) * 2 - 1
    expected = classifier(images)["digit"].softmax(1).detach()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    classifier.train(training)
    torch.testing.assert_close(classifier.probabilities(images, batch_size=3), {"digit": expected})
    torch.testing.assert_close(classifier.state_dict(), before, rtol=0, atol=0)
    assert classifier.training is training and classifier.norm1.training is training


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 8, 8\], got \[2, 1, 8, 8\]"):
        digit_classifier(**SMALL).probabilities(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("options", "flat"),
    [({}, 320), ({"image_size": 8, "kernel_size": 3, "padding": 1}, 80), ({"image_size": 32}, 500)],
)
def test_sizes(options, flat):
    classifier = digit_classifier(**options)
    size = classifier.config.image_size
    assert classifier.project.in_features == flat
    assert classifier.features(torch.zeros(2, 3, size, size)).shape == (2, 50)


def test_images_that_the_convolutions_use_up_are_refused():
    with pytest.raises(ValueError, match="images of 8 pixels are too small .* such as 3 and 1"):
        DigitClassifier({"digit": NAMES}, image_size=8)


def test_words_of_unknown_classes_are_refused():
    with pytest.raises(ValueError, match="expected words for the classes"):
        DigitClassifier({"digit": NAMES}, {"digit": {"0": ["zero"]}})


@pytest.mark.parametrize(
    ("phrasings", "expected"),
    [(["0"], ("digit", 0)), (["zero", "0"], ("digit", 0)), (["Seven"], ("digit", 7)), (["zero", "1"], None)],
)
def test_digits_are_found_by_numeral_and_word(phrasings, expected):
    assert digit_classifier(**SMALL).find_class(phrasings) == expected


def test_digit_words_of_another_class_are_its_name():
    assert digit_words(["3", "hat"]) == {"3": ["3", "three"], "hat": ["hat"]}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", [AttributeClassifier, DigitClassifier])
def test_a_saved_classifier_is_loaded_as_what_it_is(tmp_path, kind, half):
    if kind is DigitClassifier:
        classifier = digit_classifier(**SMALL)
    else:
        classifier = AttributeClassifier({"digit": NAMES}, image_size=8, channels=(8, 8), num_features=5)
    classifier.register_to_config(accuracy={"digit": 0.5})
    (classifier.half() if half else classifier).save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path)
    assert type(loaded) is kind and not loaded.training
    assert loaded.dtype == torch.float32 and loaded.config.accuracy == {"digit": 0.5}
    torch.testing.assert_close(loaded.state_dict(), classifier.float().state_dict(), rtol=0, atol=0)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(loaded(images), classifier(images))


def test_another_model_is_not_loaded_as_a_classifier(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(
        ValueError, match=r"\(AttributeClassifier or DigitClassifier or ResNetClassifier\), got AutoencoderKL in"
    ):
        load_classifier(tmp_path)


def test_a_forgetting_run_takes_either_classifier(tmp_path):
    digit_classifier(**SMALL).save_pretrained(tmp_path / "classifier")
    prompts = [f"the digit {name}" for name in NAMES]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    rows = [{"prompt": prompt, "form": form, "digit": name} for name, prompt in zip(NAMES, prompts, strict=True)
            for form in ("seen", "held_out")]  # fmt: skip
    rows.append({"prompt": "a digit", "form": "seen"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = str(tmp_path / "classifier")
    config = ForgetConfig(
        concept="zero, 0", surrogate="one", replay_prompts=str(tmp_path / "prompts.txt"), classifier=[name],
        eval_prompts=str(tmp_path / "rows.jsonl"),
    )  # fmt: skip
    inputs = read_inputs(config)
    assert type(inputs.judges[name].classifier) is DigitClassifier
    assert (inputs.judges[name].attribute, inputs.judges[name].index) == ("digit", 0)


def test_batches_are_the_images_one_by_one():
    examples, held_out, words = load_examples(ClassifierConfig(dataset="digits8x8"))
    data = load_labelled_images("digits8x8", "", "train")
    assert (len(examples), len(held_out)) == (1437, 360)
    assert words["digit"]["7"] == ["7", "seven"]
    indices = [5, 1436, 0]
    batch = examples.batch(indices)
    pixels = torch.stack([data.images[i].double() / 127.5 - 1 for i in indices]).float()
    torch.testing.assert_close(batch["sample"], torch.cat([pixels] * 3, 1))
    assert batch["labels"]["digit"].tolist() == [data.labels[i].item() for i in indices]
    assert [examples.named(i) for i in indices] == [{"digit": str(data.labels[i].item())} for i in indices]


def of_size(size: int):
    examples = load_examples(ClassifierConfig(dataset="digits8x8"))[0]
    examples.images = lambda indices: torch.zeros(len(indices), 3, size, size)
    return examples


@pytest.mark.parametrize(
    ("dataset", "architecture", "size", "expected"),
    [
        ("mnist", None, 28, DigitClassifier),
        ("mnist", "attributes", 28, AttributeClassifier),
        ("digits8x8", None, 8, DigitClassifier),
        ("imagefolder", None, 28, AttributeClassifier),
        ("imagefolder", "digit", 28, DigitClassifier),
    ],
)
def test_architecture(dataset, architecture, size, expected):
    examples = of_size(size)
    classifier = make_classifier(examples, None, ClassifierConfig(dataset=dataset, architecture=architecture))
    assert type(classifier) is expected
    assert classifier(examples.images([0, 1]))["digit"].shape == (2, 10)


def test_images_too_small_for_the_attributes_architecture():
    with pytest.raises(ValueError, match="needs 16 pixels or more, got images of 8; use digit"):
        make_classifier(of_size(8), None, ClassifierConfig(dataset="digits8x8", architecture="attributes"))


def test_the_seed_decides_the_first_weights():
    models = [make_classifier(of_size(8), None, ClassifierConfig(dataset="digits8x8", seed=s)) for s in (0, 0, 1)]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    assert not torch.equal(models[0].conv1.weight, models[2].conv1.weight)


@pytest.mark.parametrize("disturb", ["true", pytest.param("false", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_script_trains_on_the_bundled_digits(tmp_path, monkeypatch, capsys, disturb):
    options = f"--num_train_steps 120 --learning_rate 1e-2 --lr_warmup_steps 10 --disturb {disturb}"
    files = ["--config", str(CONFIGS / "digits8x8_classifier.yaml"), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["train_classifier.py", *files, *options.split()])
    train_classifier.main()
    assert "of 360 (95 % interval" in capsys.readouterr().out
    classifier = load_classifier(tmp_path / "run" / "classifier")
    assert classifier.config.accuracy["digit"] > 0.8
    test = load_labelled_images("digits8x8", "", "test")
    guesses = classifier.probabilities((2 * test.sample(range(360)) - 1).expand(-1, 3, -1, -1))["digit"].argmax(1)
    right = (guesses == test.labels).float().mean().item()
    assert right == pytest.approx(classifier.config.accuracy["digit"], abs=1.1 / 360)  # a tie may go another way


def test_mnist_config_is_the_authors():
    config = parse_config(ClassifierConfig, ["--config", str(CONFIGS / "mnist_classifier.yaml")])
    assert config.num_train_steps * config.train_batch_size == 20 * 60_000
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (1e-4, 0, None)
    changes = [int(rule.split(":")[1]) for rule in config.lr_step_rules.split(",")[:-1]]
    assert changes == pytest.approx([5 * epochs * 60_000 / 64 for epochs in (1, 2, 3)], abs=1)
