"""The ResNet classifier: transformers' network, its stems and sizes, its file, its training on CIFAR10's layout."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from sa_diffusers.cli.parse import parse_config
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.evaluation.judges.resnet_classifier import ResNetClassifier
from sa_diffusers.runs.base.classifier import (
    ClassifierConfig,
    flip_half,
    hold_out,
    load_examples,
    make_classifier,
    train_and_save_classifier,
    train_classifier,
    training_batch,
)
from scripts import train_classifier as script


CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SIZES = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}
TINY = {"image_size": 16, **SIZES}


def awake(network: nn.Module) -> nn.Module:
    """With normalisation that does something, unlike that of a new model in eval mode."""
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
    return network.eval()


def resnet_classifier(**options) -> ResNetClassifier:
    return awake(ResNetClassifier({"class": NAMES}, **(TINY | options)))


def images_of(size: int, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_it_is_the_resnet_of_transformers(layer_type):
    theirs = awake(ResNetForImageClassification(ResNetConfig(**(SIZES | {"layer_type": layer_type}), num_labels=10)))
    classifier = resnet_classifier(layer_type=layer_type)
    classifier.resnet.load_state_dict(theirs.resnet.state_dict())
    classifier.heads["class"].load_state_dict(theirs.classifier[1].state_dict())
    images = images_of(16)
    torch.testing.assert_close(classifier(images), {"class": theirs(images).logits})
    assert classifier.features(images).shape == (3, 16)


def test_the_defaults_are_resnet_34():
    with torch.device("meta"):
        classifier = ResNetClassifier({"class": [str(index) for index in range(1000)]})
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 21_797_672  # as torchvision counts


def test_the_small_stem_leaves_height_and_width():
    """One 3x3 convolution, its normalisation and a ReLU, written out, before the blocks."""
    classifier = resnet_classifier(stem="small").double()
    convolution, norm = (
        getattr(classifier.resnet.embedder.embedder, name) for name in ("convolution", "normalization")
    )
    images = images_of(16).double()
    stem = F.relu(norm(F.conv2d(F.pad(images, (1, 1, 1, 1)), convolution.weight)))
    assert stem.shape == (3, 8, 16, 16)
    maps = classifier.resnet.encoder(stem).last_hidden_state
    assert maps.shape == (3, 16, 8, 8)  # the second stage halves; of the other stem 2 x 2 would be left
    torch.testing.assert_close(classifier.features(images), maps.mean((2, 3)))
    assert resnet_classifier().resnet(images.float()).last_hidden_state.shape == (3, 16, 2, 2)


@pytest.mark.parametrize("input_size", [40, 10])
def test_images_are_scaled_inside(input_size):
    classifier, images = resnet_classifier(input_size=input_size), images_of(16)
    unscaled = resnet_classifier(image_size=input_size)
    unscaled.load_state_dict(classifier.state_dict())
    scaled = F.interpolate(images.double(), (input_size, input_size), mode="bilinear", antialias=True).float()
    torch.testing.assert_close(classifier.features(images), unscaled.features(scaled))
    torch.testing.assert_close(classifier(images), unscaled(scaled))


def test_new_heads_are_xavier_s():
    """Uniform up to sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010, eq. 16); torch's own end at 1 / 4 here."""
    head = resnet_classifier().heads["class"]
    assert 0.25 < head.weight.abs().max() <= (6 / 26) ** 0.5
    assert (head.bias == 0).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [{"input_size": 24}, {"stem": "small"}, {"layer_type": "bottleneck"}])
def test_a_saved_one_is_loaded_as_what_it_is(tmp_path, options, half):
    words = {"class": {name: [name, name[:3]] for name in NAMES}}
    classifier = resnet_classifier(words=words, **options)
    classifier.register_to_config(accuracy={"class": 0.5})
    (classifier.half() if half else classifier).save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path)
    assert type(loaded) is ResNetClassifier and not loaded.training and loaded.dtype == torch.float32
    assert loaded.config.accuracy == {"class": 0.5} and loaded.find_class(["air", "Airplane"]) == ("class", 0)
    torch.testing.assert_close(loaded.state_dict(), classifier.float().state_dict(), rtol=0, atol=0)
    images = images_of(16)
    torch.testing.assert_close(loaded.probabilities(images), {"class": classifier(images)["class"].softmax(1)})


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 16, 16\], got \[3, 3, 24, 24\]"):
        resnet_classifier(input_size=24).probabilities(images_of(24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [1]}, r"as many depths as hidden_sizes, got \[1\] and \[8, 16\]"),
        ({"stem": "large"}, "the stem imagenet or small, got 'basic' and 'large'"),
        ({"layer_type": "wide"}, "expected the layer_type basic or bottleneck .*, got 'wide' and 'imagenet'"),
        ({"words": {"class": {"airplane": ["plane"]}}}, "expected words for the classes"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        resnet_classifier(**options)


@pytest.mark.parametrize("kind", [ResNetModel, ResNetForImageClassification])
def test_it_starts_from_saved_weights(tmp_path, kind):
    saved = kind(ResNetConfig(**SIZES | {"layer_type": "bottleneck"}))
    awake(saved).save_pretrained(tmp_path)
    torch.manual_seed(1)
    classifier = ResNetClassifier.from_resnet(str(tmp_path), {"class": NAMES}, image_size=16, input_size=20)
    expected = saved.state_dict() if kind is ResNetModel else saved.resnet.state_dict()
    torch.testing.assert_close(classifier.resnet.state_dict(), expected, rtol=0, atol=0)
    assert (classifier.config.layer_type, classifier.config.hidden_sizes, classifier.config.input_size) == (
        "bottleneck", [8, 16], 20,
    )  # fmt: skip
    torch.manual_seed(1)
    again = ResNetClassifier.from_resnet(str(tmp_path), {"class": NAMES}, image_size=16)
    torch.testing.assert_close(again.heads.state_dict(), classifier.heads.state_dict(), rtol=0, atol=0)
    loaded_back = tmp_path / "classifier"
    classifier.save_pretrained(loaded_back)
    torch.testing.assert_close(load_classifier(loaded_back).state_dict(), classifier.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["microsoft/resnet-34", "nowhere/resnet", "/nowhere/resnet"])
def test_no_weights_to_start_from(source):
    with pytest.raises(OSError, match=f"(?s)got '{source}', where none can be read .* `--pretrained null`"):
        ResNetClassifier.from_resnet(source, {"class": NAMES})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "expected a ResNet of transformers, .* got a model of type 'vit'"),
        ({"downsample_in_first_stage": True}, "expected a ResNet with downsample_in_first_stage False, got True"),
        ({"hidden_act": "gelu"}, "expected a ResNet with hidden_act relu, got gelu"),
        ({"num_channels": 1}, "expected a ResNet with num_channels 3, got 1"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, change, message):
    ResNetModel(ResNetConfig(**SIZES)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        ResNetClassifier.from_resnet(str(tmp_path), {"class": NAMES})


def test_weights_with_parts_missing_are_refused(tmp_path):
    model = ResNetModel(ResNetConfig(**SIZES))
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "stages.1" not in k})
    with pytest.raises(ValueError, match=r"expected all weights of the ResNet .*, got none for encoder\.stages\.1\."):
        ResNetClassifier.from_resnet(str(tmp_path), {"class": NAMES})


def test_flips_mirror_what_the_generator_says():
    images = images_of(4, count=40)
    mirrored = flip_half(images, torch.Generator().manual_seed(3))
    heads = torch.rand(40, generator=torch.Generator().manual_seed(3)) < 0.5
    assert 10 < heads.sum() < 30
    for index, flipped in enumerate(heads.tolist()):
        columns = range(3, -1, -1) if flipped else range(4)
        expected = torch.stack([images[index, :, :, column] for column in columns], 2)
        torch.testing.assert_close(mirrored[index], expected, rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_images_are_left_out_of_training(seed):
    data = LabelledImages(torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1), torch.arange(30) % 3, list("abc"))
    rest, held_out = hold_out(data, 7, seed)
    assert (len(rest), len(held_out)) == (23, 7)
    assert sorted([*rest.images.flatten().tolist(), *held_out.images.flatten().tolist()]) == list(range(30))
    for part in (rest, held_out):
        torch.testing.assert_close(part.labels, part.images.flatten().long() % 3, rtol=0, atol=0)
    assert torch.equal(held_out.images, hold_out(data, 7, seed)[1].images)
    assert not torch.equal(held_out.images, hold_out(data, 7, seed + 1)[1].images)


@pytest.mark.parametrize("count", [0, 3, 4])
def test_held_out_images_leave_some(count):
    data = LabelledImages(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), ["a"])
    with pytest.raises(ValueError, match=f"expected num_held_out from 1 to 2, .*, got {count}"):
        hold_out(data, count, 0)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory) -> Path:
    """In the layout of `uoft-cs/cifar10`: classes 0 to 3, each with a colour of its own on its left half."""
    folder, rng = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)
    colours = np.array([[230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30]])
    for split, count in (("train", 40), ("test", 12)):
        labels = [index % 4 for index in range(count)]
        pixels = rng.integers(256, size=(count, 32, 32, 3))
        pixels[:, :, :16] = (pixels[:, :, :16] + 5 * colours[labels][:, None, None]) // 6
        rows = {"img": [Image.fromarray(image.astype(np.uint8)) for image in pixels], "label": labels}
        features = Features(img=ImageColumn(), label=ClassLabel(names=NAMES))
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def tiny_config(folder: Path, **options) -> ClassifierConfig:
    values = {
        "dataset": "cifar10", "data_dir": str(folder), "depths": [1, 1], "hidden_sizes": [8, 16], "stem": "small",
        "train_batch_size": 8, "num_train_steps": 2, "learning_rate": 1e-2, "disturb": False,
        "checkpointing_steps": None,
    }  # fmt: skip
    return ClassifierConfig(**(values | options))


def test_batches_are_the_images_one_by_one(cifar10):
    examples, held_out, words = load_examples(tiny_config(cifar10))
    assert (len(examples), len(held_out), words, examples.classes) == (40, 12, None, {"class": NAMES})
    batch = examples.batch([39, 4, 4])
    rows = Dataset.from_parquet(str(cifar10 / "train-00000-of-00001.parquet"), cache_dir=str(cifar10 / "cache"))
    expected = [np.array(rows[index]["img"]).transpose(2, 0, 1) / 127.5 - 1 for index in (39, 4, 4)]
    torch.testing.assert_close(batch["sample"].double(), torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-6)
    assert batch["labels"]["class"].tolist() == [3, 0, 0]


def test_held_out_images_of_both_splits(cifar10):
    examples, held_out, _ = load_examples(tiny_config(cifar10, num_held_out=5))
    assert (len(examples), len(held_out)) == (47, 5)


@pytest.mark.parametrize("pretrained", [False, True])
def test_the_configuration_decides_the_network(cifar10, tmp_path, pretrained):
    examples = load_examples(tiny_config(cifar10))[0]
    if pretrained:
        saved = awake(ResNetModel(ResNetConfig(**SIZES)))
        saved.save_pretrained(tmp_path)
        config = tiny_config(cifar10, pretrained=str(tmp_path), stem="imagenet", depths=[9], input_size=48)
    else:
        config = tiny_config(cifar10, input_size=48)
    first, second = (make_classifier(examples, None, config) for _ in range(2))
    assert type(first) is ResNetClassifier
    assert (first.config.image_size, first.config.input_size, first.config.stem) == (32, 48, config.stem)
    assert (list(first.config.depths), first.config.embedding_size) == ([1, 1], 8)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    if pretrained:
        torch.testing.assert_close(first.resnet.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_flips_differ_by_seed_and_step_only(cifar10):
    examples = load_examples(tiny_config(cifar10))[0]

    def flips(seed: int, step: int) -> list[bool]:
        config = tiny_config(cifar10, train_batch_size=20, seed=seed)
        plain, batch = (training_batch(examples, replace(config, flip=flip), step) for flip in (False, True))
        assert torch.equal(plain["labels"]["class"], batch["labels"]["class"])
        for image, given in zip(plain["sample"], batch["sample"], strict=True):
            assert torch.equal(image, given) or torch.equal(image.flip(2), given)
        return [not torch.equal(*pair) for pair in zip(plain["sample"], batch["sample"], strict=True)]

    drawn = [flips(seed, step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert drawn[0] == flips(0, 0)
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2] and 0 < sum(drawn[0]) < 20


def test_training_sees_the_flips(cifar10, tmp_path):
    examples = load_examples(tiny_config(cifar10))[0]
    symmetric = copy.copy(examples)  # of images that are their own mirror images nothing changes
    symmetric.images = lambda indices: (examples.images(indices) + examples.images(indices).flip(3)) / 2
    for data, equal in ((examples, False), (symmetric, True)):
        configs = [tiny_config(cifar10, flip=f, output_dir=str(tmp_path / f"{f} {equal}")) for f in (True, False)]
        weights = [train_classifier(data, None, config).state_dict() for config in configs]
        assert torch.equal(*(tensors["heads.class.weight"] for tensors in weights)) is equal


@pytest.mark.slow
def test_script_trains_on_cifar10(cifar10, tmp_path, monkeypatch, capsys):
    options = (
        f"--config {CONFIGS / 'cifar10_classifier.yaml'} --data_dir {cifar10} --output_dir {tmp_path / 'run'} "
        "--pretrained null --stem small --input_size 16 --depths 1 1 --hidden_sizes 8 16 --num_train_steps 25 "
        "--train_batch_size 20 --learning_rate 1e-2"
    )
    monkeypatch.setattr("sys.argv", ["train_classifier.py", *options.split()])
    script.main()
    assert "class: 1.0000 of 12 (95 % interval" in capsys.readouterr().out
    classifier = load_classifier(tmp_path / "run" / "classifier")
    assert type(classifier) is ResNetClassifier and classifier.config.accuracy == {"class": 1.0}
    assert classifier.config.input_size == 16 and classifier.find_class(["Airplane"]) == ("class", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "mnist", "pretrained": "a/b"}, "expected the architecture resnet, got digit"),
        ({"dataset": "cifar10", "pretrained": "a/b", "stem": "small"}, "a/b has the stem imagenet, got small"),
        ({"dataset": "imagefolder", "num_held_out": 5}, "imagefolder chooses its own held-out images; .* got 5"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**options)


def test_a_folder_must_be_given():
    with pytest.raises(ValueError, match="expected a folder of images, got none; pass --data_dir"):
        load_examples(ClassifierConfig())


def test_weights_are_looked_for_before_images():
    with pytest.raises(OSError, match="got 'nowhere/resnet', where none can be read"):
        train_and_save_classifier(ClassifierConfig(dataset="cifar10", pretrained="nowhere/resnet", data_dir="nowhere"))


@pytest.mark.parametrize(("dataset", "num_images"), [("cifar10", 50_000), ("stl10", 12_000)])
def test_the_configs_are_the_authors(dataset, num_images):
    """10 epochs as the authors count them; the last batch of theirs is smaller."""
    config = parse_config(ClassifierConfig, ["--config", str(CONFIGS / f"{dataset}_classifier.yaml")])
    assert config.num_train_steps == 10 * -(-num_images // 128) and config.train_batch_size == 128
    assert (config.dataset, config.data_dir, config.architecture) == (dataset, None, "resnet")
    assert (config.pretrained, config.input_size, config.flip) == ("microsoft/resnet-34", 224, True)
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (1e-5, 5e-4, None)
    assert (config.disturb, config.lr_scheduler) == (False, "constant")
    assert config.num_held_out == (1000 if dataset == "stl10" else None)
