"""Labelled image sets: folders in the hub's layouts, the digits of scikit-learn, what is left out, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageColumn
from PIL import Image
from torch.nn import functional as F

from sa_diffusers.data.labelled_images import LabelledImages, load_labelled_images


NAMES = [str(digit) for digit in range(10)]


def drawings(count: int, size: tuple[int, int] = (28, 28), mode: str = "L") -> list[Image.Image]:
    """Images of random pixels, [width, height]; each channel has its own."""
    rng = np.random.default_rng(count)
    bands = Image.new(mode, (1, 1)).getbands()
    return [
        Image.merge(mode, [Image.fromarray(rng.integers(256, size=size[::-1], dtype=np.uint8)) for _ in bands])
        for _ in range(count)
    ]


def write_split(folder: Path, split: str, images: list[Image.Image], **columns: object) -> None:
    """A parquet file as the hub stores `ylecun/mnist`; `columns` are further ones, None leaves one out."""
    folder.mkdir(exist_ok=True)
    rows = {"image": images, "label": [(3 * index + 1) % 10 for index in range(len(images))]} | columns
    kinds = {"image": ImageColumn(), "img": ImageColumn(), "label": ClassLabel(names=NAMES)}
    features = Features({name: kinds.get(name, Value("int64")) for name, column in rows.items() if column is not None})
    data = Dataset.from_dict({name: rows[name] for name in features}, features)
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def mnist(tmp_path) -> Path:
    write_split(tmp_path / "mnist", "train", drawings(12))
    write_split(tmp_path / "mnist", "test", drawings(5))
    return tmp_path / "mnist"


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("test", 5)])
def test_mnist_is_what_datasets_decodes_row_by_row(mnist, split, count):
    data = load_labelled_images("mnist", str(mnist), split)
    rows = load_dataset(str(mnist), split=split)
    assert len(data) == len(rows) == count
    assert data.names == NAMES
    assert data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
    for index, row in enumerate(rows):
        expected = torch.from_numpy(np.array(row["image"]))[None]
        torch.testing.assert_close(data.images[index], expected, rtol=0, atol=0)
        assert data.labels[index] == row["label"]


@pytest.mark.parametrize("column", ["img", "image"])
def test_cifar10_is_what_datasets_decodes_row_by_row(tmp_path, column):
    images = drawings(6, (32, 32), "RGB")
    write_split(tmp_path / "cifar10", "train", images, **({"image": None, "img": images} if column == "img" else {}))
    data = load_labelled_images("cifar10", str(tmp_path / "cifar10"), "train")
    assert data.images.shape == (6, 3, 32, 32) and data.images.dtype == torch.uint8
    for index, row in enumerate(load_dataset(str(tmp_path / "cifar10"), split="train")):
        for channel, band in enumerate(row[column].split()):
            torch.testing.assert_close(data.images[index, channel], torch.from_numpy(np.array(band)), rtol=0, atol=0)
        assert data.labels[index] == row["label"]


def test_stl10_is_scaled_to_64_pixels_with_antialiasing(tmp_path):
    images = drawings(3, (96, 96), "RGB")
    write_split(tmp_path / "stl10", "train", images)
    data = load_labelled_images("stl10", str(tmp_path / "stl10"), "train")
    assert data.images.shape == (3, 3, 64, 64) and data.images.dtype == torch.uint8
    originals = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).double()
    expected = F.interpolate(originals, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(data.images.double(), expected, rtol=0, atol=1.01)  # PIL rounds after each direction
    coarse = F.interpolate(originals, (64, 64), mode="bilinear")
    assert (data.images - coarse).abs().max() > 10


@pytest.mark.parametrize("dataset", ["mnist", "digits8x8"])
def test_all_is_train_then_test(mnist, dataset):
    train, test, both = (load_labelled_images(dataset, str(mnist), split) for split in ("train", "test", "all"))
    assert not torch.equal(train.images[: len(test)], test.images)
    torch.testing.assert_close(both.images, torch.cat([train.images, test.images]), rtol=0, atol=0)
    torch.testing.assert_close(both.labels, torch.cat([train.labels, test.labels]), rtol=0, atol=0)
    assert both.names == train.names


@pytest.mark.parametrize("left_out", [["b"], ["d", "a"], []])
def test_without_keeps_the_others_and_their_numbers(left_out):
    labels = torch.tensor([0, 1, 3, 2, 1, 0, 3, 2])
    data = LabelledImages(torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1), labels, list("abcd"))
    kept = [index for index in range(8) if "abcd"[labels[index]] not in left_out]
    rest = data.without(left_out)
    assert rest.images.flatten().tolist() == kept
    assert rest.labels.tolist() == [labels[index] for index in kept]
    assert rest.names == data.names == list("abcd") and len(data) == 8


@pytest.mark.parametrize(
    ("names", "message"),
    [(["b", "e"], r"expected names of a, b, c, got \['e'\]"), (["c", "a"], "expected some images .* without c, a;")],
)
def test_without_what_cannot_be_left_out(names, message):
    data = LabelledImages(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2, 2]), list("abc"))
    with pytest.raises(ValueError, match=message):
        data.without(names)


@pytest.mark.parametrize("indices", [[4, 0, 4], torch.tensor([4, 0, 4])])
def test_a_sample_is_the_chosen_images_from_0_to_1(indices):
    images = torch.arange(5 * 2 * 9, dtype=torch.uint8).view(5, 2, 3, 3) + 166
    data = LabelledImages(images, torch.arange(5), list("abcde"))
    expected = torch.stack([torch.tensor(images[i].tolist()) / 255 for i in (4, 0, 4)])
    torch.testing.assert_close(data.sample(indices), expected)
    assert images.max() == 255 and data.sample(indices).max() == 1


def test_digits8x8_are_all_of_scikit_learn_s_once():
    from sklearn.datasets import load_digits

    original = load_digits()
    train, test = (load_labelled_images("digits8x8", "", split) for split in ("train", "test"))
    assert train.images.shape == (1437, 1, 8, 8) and test.images.shape == (360, 1, 8, 8)
    assert train.names == test.names == NAMES
    images, labels = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    restored = (images[:, 0].double() * 16 / 255).round()
    expected = torch.from_numpy(original.images)
    found = sorted(
        (*pixels, label) for pixels, label in zip(restored.flatten(1).tolist(), labels.tolist(), strict=True)
    )
    known = zip(expected.flatten(1).tolist(), original.target.tolist(), strict=True)
    assert found == sorted((*pixels, label) for pixels, label in known)
    assert images.min() == 0 and images.max() == 255


def test_digits8x8_has_every_class_in_equal_shares_of_both_splits():
    train, test = (load_labelled_images("digits8x8", "", split) for split in ("train", "test"))
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    torch.testing.assert_close(share, torch.full((10,), 360 / 1797), rtol=0, atol=0.004)


def test_digits8x8_is_split_alike_at_every_call():
    first, second = (load_labelled_images("digits8x8", "", "test") for _ in range(2))
    torch.testing.assert_close(first.images, second.images, rtol=0, atol=0)
    torch.testing.assert_close(first.labels, second.labels, rtol=0, atol=0)


@pytest.mark.parametrize("data_dir", ["nowhere/mnist", "/nowhere/mnist"])
def test_nothing_at_that_place(data_dir):
    with pytest.raises(ValueError, match=rf"got '{data_dir}', where there is nothing.* --dataset digits8x8"):
        load_labelled_images("mnist", data_dir, "train")


@pytest.mark.parametrize(
    ("dataset", "hub_id"), [("mnist", "ylecun/mnist"), ("cifar10", "uoft-cs/cifar10"), ("stl10", "tanganke/stl10")]
)
def test_the_hub_is_asked_where_no_folder_is_given(dataset, hub_id):
    with pytest.raises(ValueError, match=f"got '{hub_id}', where there is nothing"):
        load_labelled_images(dataset, None, "test")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="where there is nothing to read"):
        load_labelled_images("mnist", str(tmp_path), "train")


@pytest.mark.parametrize("split", ["test", "all"])
def test_a_missing_split(tmp_path, split):
    write_split(tmp_path / "mnist", "train", drawings(2))
    with pytest.raises(ValueError, match=r"expected a test split in .*mnist, got \['train'\]"):
        load_labelled_images("mnist", str(tmp_path / "mnist"), split)


def test_a_missing_column(tmp_path):
    write_split(tmp_path / "mnist", "train", drawings(2), label=None, digit=[1, 2])
    with pytest.raises(ValueError, match=r"image \(or img\) and label, as in ylecun/mnist, got \['image', 'digit'\]"):
        load_labelled_images("mnist", str(tmp_path / "mnist"), "train")


def test_a_missing_image_column(tmp_path):
    write_split(tmp_path / "cifar10", "train", drawings(2), image=None, digit=[1, 2])
    with pytest.raises(ValueError, match=r"as in uoft-cs/cifar10, got \['label', 'digit'\]"):
        load_labelled_images("cifar10", str(tmp_path / "cifar10"), "train")


def test_images_of_no_class(tmp_path):
    write_split(tmp_path / "stl10", "train", drawings(3, (96, 96), "RGB"), label=[2, -1, -1])
    with pytest.raises(ValueError, match="expected a class for every image of .*stl10, got 2 images of no class"):
        load_labelled_images("stl10", str(tmp_path / "stl10"), "train")


def test_labels_without_names(tmp_path):
    data = Dataset.from_dict(
        {"image": drawings(2), "label": [1, 2]}, Features(image=ImageColumn(), label=Value("int64"))
    )
    (tmp_path / "mnist").mkdir()
    data.to_parquet(tmp_path / "mnist" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"\(a ClassLabel\), got Value\('int64'\)"):
        load_labelled_images("mnist", str(tmp_path / "mnist"), "train")


def test_no_images(tmp_path):
    write_split(tmp_path / "mnist", "train", [])
    with pytest.raises(ValueError, match="expected images in .*mnist, got none .*; download the data set again"):
        load_labelled_images("mnist", str(tmp_path / "mnist"), "train")


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (drawings(1, (28, 27)), "image 3 of .* 28x27 pixels and mode L"),
        (drawings(1, (32, 32)), "image 3 of .* 32x32 pixels and mode L"),
        (drawings(1, mode="RGB"), "image 3 of .* 28x28 pixels and mode RGB"),
    ],
)
def test_an_image_that_is_not_mnist_s(tmp_path, odd, named):
    write_split(tmp_path / "mnist", "train", [*drawings(3), *odd])
    with pytest.raises(ValueError, match=f"expected grey images of 28x28 pixels as in MNIST, got {named}"):
        load_labelled_images("mnist", str(tmp_path / "mnist"), "train")


@pytest.mark.parametrize(
    ("dataset", "size", "mode", "message"),
    [
        ("cifar10", 32, "L", "expected RGB images of 32x32 pixels as in CIFAR10, got image 0 of test of .* mode L"),
        ("cifar10", 28, "RGB", "as in CIFAR10, got image 0 of test of .* 28x28 pixels and mode RGB"),
        (
            "stl10",
            64,
            "RGB",
            "expected RGB images of 96x96 pixels as in STL10, got image 0 of test of .* 64x64 pixels",
        ),
    ],
)
def test_an_image_that_is_not_of_that_data_set(tmp_path, dataset, size, mode, message):
    right = 96 if dataset == "stl10" else 32
    write_split(tmp_path / "images", "train", drawings(1, (right, right), "RGB"))
    write_split(tmp_path / "images", "test", drawings(2, (size, size), mode))
    with pytest.raises(ValueError, match=message):
        load_labelled_images(dataset, str(tmp_path / "images"), "all")


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("mnist", "validation", "expected the split train, test or all, got 'validation'"),
        ("cifar", "train", "mnist, digits8x8, cifar10, stl10, got 'cifar'"),
    ],
)
def test_unknown_names(dataset, split, message):
    with pytest.raises(ValueError, match=message):
        load_labelled_images(dataset, "", split)
