"""Groups of pictures: by classes, from folders and parquet, with what is held out, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from torch.testing import assert_close

from sa_diffusers.data.images import read_image
from sa_diffusers.data.labelled_images import load_labelled_images
from sa_diffusers.data.picture_groups import check_apart, read_group, split_spec


def picture(index: int, size: tuple[int, int] = (8, 8), mode: str = "L") -> Image.Image:
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of ten pictures, a folder each, of several sizes."""
    folder = tmp_path_factory.mktemp("pets")
    for position, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for index in range(10):
            picture(10 * position + index, (12, 10) if index % 2 else (8, 8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    features = Features(image=ImageColumn(), label=ClassLabel(names=["zero", "one"]))
    for split, first, count in (("train", 0, 8), ("test", 100, 6)):
        rows = {"image": [picture(first + i) for i in range(count)], "label": [i % 2 for i in range(count)]}
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_classes_of_a_folder_and_every_fifth_is_held_out(folder):
    group = read_group(f"{folder}:dog", "forget_images", 8)
    assert group.name == "dog" and group.classes == ["dog"] and group.channels == 1
    assert (len(group.train), len(group.test)) == (8, 2)
    expected = read_image(folder / "dog" / "3.png", 8)  # of 12 x 10 pixels: cropped and scaled
    found = (2 * group.train.sample(range(8)) - 1).expand(-1, 3, -1, -1)
    assert_close(found[3], expected)
    everything = read_group(str(folder), "forget_images", 8)
    assert everything.name == "cat, dog" and len(everything.train) == 16


def test_classes_and_pictures_may_be_called_as_splits_are(tmp_path):
    for position, name in enumerate(("train", "bus")):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        for index in range(10):
            picture(10 * position + index).save(tmp_path / "vehicles" / name / f"{index}.png")
    group = read_group(str(tmp_path / "vehicles"), "forget_images", 8)
    assert group.classes == ["bus", "train"] and (len(group.train), len(group.test)) == (16, 4)
    (tmp_path / "flat").mkdir()
    for index in range(10):
        picture(index).save(tmp_path / "flat" / f"{'test_' if index > 7 else ''}{index}.png")
    flat = read_group(str(tmp_path / "flat"), "forget_images", 8)
    assert (len(flat.train), len(flat.test)) == (8, 2)


def save_classes(folder, count=10):
    """Two classes of different pictures, a folder each."""
    for position, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(100 * position + index).save(folder / name / f"{index}.png")


@pytest.mark.parametrize(
    ("stray", "beside"), [("notes.png", "cat"), ("cat/more/0.png", "cat/more"), ("album/dog/0.png", "album/dog")]
)
def test_pictures_beside_folders_of_classes_are_refused(tmp_path, stray, beside):
    save_classes(tmp_path)  # `datasets` would take all of them for one class
    (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
    picture(999).save(tmp_path / stray)
    with pytest.raises(ValueError, match=rf"expected a folder a class, .* lies beside folders such as {beside}; move"):
        read_group(str(tmp_path), "forget_images", 8)


def test_other_files_and_one_deep_folder_are_no_matter(tmp_path):
    save_classes(tmp_path / "pets")
    for name in ("README.md", "pets/notes.txt", "pets/cat/.DS_Store"):
        (tmp_path / name).write_text("x")
    assert read_group(str(tmp_path), "forget_images", 8).classes == ["cat", "dog"]


@pytest.mark.parametrize(("splits", "counts"), [(["test"], (16, 4)), (["train", "validation"], (20, 10))])
def test_a_split_to_judge_by_is_one_beside_another(tmp_path, splits, counts):
    for split, count in zip(splits, (10, 5), strict=False):
        save_classes(tmp_path / split, count)
    group = read_group(str(tmp_path), "forget_images", 8)
    assert (len(group.train), len(group.test)) == counts and group.classes == ["cat", "dog"]


def test_every_fifth_of_each_class_is_held_out(tmp_path):
    rows = {
        "image": [picture(i) for i in range(50)],
        "label": [i % 5 for i in range(50)],
    }  # else all of the last class
    Dataset.from_dict(rows, Features(image=ImageColumn(), label=Value("int64"))).to_parquet(tmp_path / "train.parquet")
    for name in "04":
        group = read_group(f"{tmp_path}:{name}", "forget_images", 8)
        assert (len(group.train), len(group.test)) == (8, 2)


def test_a_single_class_keeps_its_name(tmp_path):
    for index in range(6):
        (tmp_path / "cat").mkdir(exist_ok=True)
        picture(index).save(tmp_path / "cat" / f"{index}.png")
    assert read_group(f"{tmp_path}:cat", "forget_images", 8).name == "cat"


def test_every_class_is_judged_by_a_picture_or_refused(tmp_path):
    save_classes(tmp_path / "few", 3)
    group = read_group(str(tmp_path / "few"), "forget_images", 8)
    assert group.classes == ["cat", "dog"] and (len(group.train), len(group.test)) == (4, 2)
    save_classes(tmp_path / "lone", 5)
    for index in range(1, 5):
        (tmp_path / "lone" / "cat" / f"{index}.png").unlink()
    with pytest.raises(ValueError, match="expected pictures to judge by of every class of .*, got none of cat"):
        read_group(str(tmp_path / "lone"), "forget_images", 8)
    assert read_group(f"{tmp_path / 'lone'}:dog", "forget_images", 8).classes == ["dog"]


def test_splits_of_several_modes_are_refused(tmp_path):
    for split, mode in (("train", "L"), ("test", "RGB")):
        (tmp_path / split / "cat").mkdir(parents=True)
        for index in range(3):
            picture(index, mode=mode).save(tmp_path / split / "cat" / f"{index}.png")
    with pytest.raises(ValueError, match="expected grey pictures or RGB ones, got both in the splits"):
        read_group(str(tmp_path), "forget_images", 8)


def test_what_is_not_judged_by_is_all_trained_on(tmp_path, parquet):
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    group = read_group(str(tmp_path), "surrogate", 8, judged=False)
    assert (len(group.train), len(group.test)) == (3, 0)
    assert len(read_group(str(parquet), "surrogate", 8, judged=False).test) == 0


@pytest.mark.parametrize(
    ("kind", "value"), [(Value("int64"), None), (Value("int64"), -1), (Value("string"), None), ([Value("int64")], [1])]
)
def test_pictures_without_a_class_of_their_own_are_refused(tmp_path, kind, value):
    known = {"int64": 1, "string": "cat"}[kind.dtype] if isinstance(kind, Value) else [2]
    rows = {"image": [picture(i) for i in range(10)], "label": [known] * 7 + [value] + [known] * 2}
    Dataset.from_dict(rows, Features(image=ImageColumn(), label=kind)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"forget_images: expected a class as the label of every picture of .*, got"):
        read_group(str(tmp_path), "forget_images", 8)


@pytest.mark.parametrize("values", [[3, 5, 11], ["ant", "bee", "cat"]])
def test_labels_without_names_are_their_own(values, tmp_path):
    rows = {"image": [picture(i) for i in range(30)], "label": [values[i % 3] for i in range(30)]}
    kind = Value("string" if isinstance(values[0], str) else "int64")
    Dataset.from_dict(rows, Features(image=ImageColumn(), label=kind)).to_parquet(tmp_path / "train.parquet")
    assert read_group(str(tmp_path), "forget_images", 8).classes == list(map(str, values))
    one = read_group(f"{tmp_path}:{values[2]}", "forget_images", 8)
    assert one.name == str(values[2]) and len(one.train) + len(one.test) == 10


def test_splits_classes_and_counts_of_parquet(parquet):
    group = read_group(f"{parquet}:one", "retain_images", 8, (3, 2))
    assert (len(group.train), len(group.test)) == (3, 2)
    expected = [torch.from_numpy(np.array(picture(index)))[None] for index in (1, 3, 5)]
    assert group.train.images.equal(torch.stack(expected))
    assert group.test.images[1].equal(torch.from_numpy(np.array(picture(103)))[None])
    inner = read_group(f"{parquet}:one", "retain_images", 8, crop=4)
    middle = Image.fromarray(np.array(picture(1))[2:6, 2:6])
    assert_close(inner.train.images[0, 0], torch.from_numpy(np.array(middle.resize((8, 8), Image.Resampling.LANCZOS))))


def test_small_digits_have_the_split_that_they_have_elsewhere():
    group = read_group("digits8x8:7", "forget_images", 8)
    for split, part in (("train", group.train), ("test", group.test)):
        known = load_labelled_images("digits8x8", None, split)
        assert part.images.equal(known.images[known.labels == 7])
    assert read_group("digits8x8:7", "forget_images", 16).train.images.shape[1:] == (1, 16, 16)


def test_pictures_without_classes_are_one(tmp_path):
    for index in range(5):
        picture(index, mode="RGB").save(tmp_path / f"{index}.png")
    group = read_group(str(tmp_path), "surrogate", 8)
    assert (group.name, group.channels, len(group.train), len(group.test)) == (tmp_path.name, 3, 4, 1)


def test_a_fingerprint_is_of_the_pictures_and_not_of_their_place(parquet, tmp_path):
    (tmp_path / "copy").mkdir()
    for path in parquet.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    groups = [
        read_group(f"{place}:{names}", "x", 8) for place, names in ((parquet, "one"), (tmp_path / "copy", "one"))
    ]
    assert groups[0].fingerprint == groups[1].fingerprint != read_group(f"{parquet}:zero", "x", 8).fingerprint


def test_specs(tmp_path):
    assert split_spec("mnist:2, 5") == ("mnist", ["2", "5"])
    assert split_spec("mnist") == ("mnist", [])
    with pytest.raises(ValueError, match="names of classes after the colon of 'mnist: ,', got none; omit it for all"):
        split_spec("mnist: ,")
    (tmp_path / "a:b").mkdir()
    assert split_spec(str(tmp_path / "a:b")) == (str(tmp_path / "a:b"), [])


def test_overlapping_groups_are_refused(folder, tmp_path):
    dogs, cats, all_of_them = (read_group(spec, "x", 8) for spec in (f"{folder}:dog", f"{folder}:cat", str(folder)))
    check_apart({"forget": dogs, "retain": cats})
    said = r"a picture is in the groups forget \(dog\) and retain \(cat, dog\); remove it from one"
    with pytest.raises(ValueError, match=said):
        check_apart({"forget": dogs, "retain": all_of_them})
    with pytest.raises(ValueError, match=r"forget \(dog\) and retain \(dog\)"):  # of one name
        check_apart({"forget": dogs, "retain": dogs})
    for index in range(5):
        picture(0 if index in (1, 4) else index).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match="is to train and to judge by"):
        check_apart({"forget": read_group(str(tmp_path), "x", 8)})


@pytest.mark.parametrize(
    ("names", "mode", "said"),
    [
        (":bird", "L", "forget_images: .* has no class 'bird'; it has cat, dog"),
        ("", "RGBA", "expected a grey picture or one in RGB, got picture .* of the mode RGBA"),
        ("", "RGB", "expected grey pictures or RGB ones, got both"),
    ],
)
def test_what_is_no_group_is_refused(tmp_path, names, mode, said):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(6):
            picture(index).save(tmp_path / name / f"{index}.png")
    Image.new(mode, (8, 8)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match=said):
        read_group(f"{tmp_path}{names}", "forget_images", 8)


def test_too_few_pictures_and_too_large_a_crop_are_refused(tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="forget_images: expected pictures in .*empty, got a folder without files"):
        read_group(str(tmp_path / "empty"), "forget_images", 8)
    with pytest.raises(ValueError, match="forget_images: expected pictures to train and to judge by .*, got 1 and 0"):
        read_group(str(tmp_path), "forget_images", 8)
    with pytest.raises(ValueError, match="expected pictures of 9 pixels or more"):
        read_group(str(tmp_path), "forget_images", 8, crop=9)
