"""Groups of real pictures, to forget, to retain or to compare with: "source" or "source:class,class"."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sa_diffusers.data.images import IMAGE_SUFFIXES, crop_to_square, one_split, opened_image, to_rgb
from sa_diffusers.data.labelled_images import HUB_IDS, LabelledImages, load_labelled_images
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import explain_load_errors


HELD_OUT = 5  # of a source without test split, every fifth picture of a class


@dataclass(frozen=True)
class PictureGroup:
    """Pictures of some classes, for training, and others of them to judge by."""

    name: str
    train: LabelledImages
    test: LabelledImages

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def classes(self) -> list[str]:
        """Names of the classes that are in it."""
        return [self.test.names[index] for index in self.test.labels.unique().tolist()]

    @property
    def hashes(self) -> list[str]:
        """One a picture, of training and test ones."""
        return [_hash(image) for part in (self.train, self.test) for image in part.images]

    @property
    def fingerprint(self) -> str:
        """Of all pictures and their labels, in their order."""
        parts = {"train": self.train, "test": self.test}
        return hash_tensors(
            {f"{n} {kind}": getattr(part, kind) for n, part in parts.items() for kind in ("images", "labels")}
        )


def read_group(
    spec: str,
    flag: str,
    size: int,
    per_class: tuple[int | None, int | None] = (None, None),
    crop: int | None = None,
    judged: bool = True,
) -> PictureGroup:
    """Read a group, every picture cropped to a square and scaled, never stretched.

    Args:
        spec: a folder with a folder a class or of pictures alone, a data set of the hub or in a local folder with the
            columns image (or img) and label, bundled/<name>, mnist, cifar10, stl10, or digits8x8; after a colon the
            names of classes, none for all.
        flag: how messages call it.
        size: height and width in pixels.
        per_class: how many pictures a class to take at most, of training and of test ones.
        crop: take the centre of so many pixels first.
        judged: whether the group needs pictures to judge by; else none are held out, and those of a test split stay.

    Raises:
        ValueError: no such source, class or picture; pictures of several modes, or beside folders of them; a picture
            without label; a group without any.
        ModelLoadError: nothing that can be loaded.
    """
    source, names = split_spec(spec)
    if source == "digits8x8":
        found = _small_digits(spec, names, size, per_class, flag)
    else:
        found = _read(HUB_IDS.get(source, source), names, size, per_class, crop, flag, judged)
    if not all(map(len, found if judged else found[:1])):
        counts = " and ".join(str(len(part)) for part in found)
        raise ValueError(f"{flag}: expected pictures to train and to judge by in {spec}, got {counts}; add some")
    used = [found[0].names[index] for index in found[0].labels.unique().tolist()]
    return PictureGroup(", ".join(used), *found)


def split_spec(spec: str) -> tuple[str, list[str]]:
    """ "mnist:2,5" -> ("mnist", ["2", "5"]); a folder may have a colon in its name."""
    source, colon, classes = spec.rpartition(":")
    if not colon or Path(spec).is_dir():
        return spec, []
    names = [name.strip() for name in classes.split(",") if name.strip()]
    if not names:
        raise ValueError(f"expected the names of classes after the colon of {spec!r}, got none; omit it for all")
    return source, names


def check_apart(groups: Mapping[str, PictureGroup]) -> None:
    """Raise ValueError where a picture is in two of the groups, or stands for training and for judging in one."""
    seen: dict[str, str] = {}
    for role, group in groups.items():
        if len(set(group.hashes)) < len(group.hashes) and {*map(_hash, group.train.images)} & {
            *map(_hash, group.test.images)
        }:
            raise ValueError(f"a picture of {group.name} is to train and to judge by; remove one of the two")
        for found in set(group.hashes):
            if seen.setdefault(found, role) != role:
                other = seen[found]
                raise ValueError(
                    f"a picture is in the groups {other} ({groups[other].name}) and {role} ({group.name}); remove it "
                    "from one"
                )


def check_unseen(role: str, group: PictureGroup, judged: Mapping[str, PictureGroup]) -> None:
    """Raise ValueError where a training picture of `group` is one that another group is judged by."""
    seen = set(map(_hash, group.train.images))
    for other, pictures in judged.items():
        if seen & set(map(_hash, pictures.test.images)):
            raise ValueError(
                f"a picture of the group {role} ({group.name}) is one that {other} ({pictures.name}) is judged by; "
                "remove it from one"
            )


def _hash(image: Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]


def _small_digits(
    spec: str, names: list[str], size: int, per_class: tuple[int | None, int | None], flag: str
) -> list[LabelledImages]:
    found = []
    for split, count in zip(("train", "test"), per_class, strict=True):
        data = load_labelled_images("digits8x8", None, split)
        scaled = F.interpolate(data.images.float(), size=(size, size), mode="bilinear").round().to(torch.uint8)
        rows = _chosen(data.labels.tolist(), data.names, names, count, flag, spec)
        found.append(LabelledImages(scaled, data.labels, data.names).take(torch.tensor(rows, dtype=torch.long)))
    return found


def _chosen(
    labels: list[int], known: list[str], names: list[str], count: int | None, flag: str, spec: str
) -> list[int]:
    """The rows of some classes (none: of all), the first `count` of each."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{flag}: {spec} has no class {unknown[0]!r}; it has {', '.join(known)}")
    wanted, taken, rows = {known.index(name) for name in names} or set(range(len(known))), dict.fromkeys(labels, 0), []
    for row, label in enumerate(labels):
        if label in wanted and (count is None or taken[label] < count):
            taken[label] += 1
            rows.append(row)
    return rows


def _read(
    source: str,
    names: list[str],
    size: int,
    per_class: tuple[int | None, int | None],
    crop: int | None,
    flag: str,
    judged: bool,
) -> list[LabelledImages]:
    """Training and test pictures of a folder or hub data set."""
    from datasets import Image as Encoded
    from datasets import load_dataset

    if source.startswith(("/", ".", "~", "bundled/")) and not Path(resolve(source)).is_dir():
        raise ValueError(f"{flag}: expected a folder of pictures or a data set, got {source}, where there is nothing")
    if Path(resolve(source)).is_dir() and not any(map(Path.is_file, Path(resolve(source)).rglob("*"))):
        raise ValueError(f"{flag}: expected pictures in {source}, got a folder without files; add some")
    folder = resolve(source)
    in_folders = _in_folders(folder, flag)
    with explain_load_errors(folder, "dataset"):
        one = one_split(folder)
        if one and in_folders:
            one["drop_labels"] = False  # else it drops that of a single class
        tables = load_dataset("imagefolder", data_dir=folder, **one) if one else load_dataset(folder)
    table = tables["train"] if "train" in tables else next(iter(tables.values()))
    column = next((name for name in ("image", "img") if name in table.column_names), None)
    if column is None:
        raise ValueError(f"{flag}: expected a column image (or img) in {source}, got {table.column_names}; rename one")
    known = getattr(table.features.get("label"), "names", None)
    for part in tables.values():
        _check_labels(part["label"] if "label" in part.column_names else (), source, flag)
    values = sorted({value for part in tables.values() for value in part["label"]}) if _unnamed(table) else []
    known = known or list(map(str, values)) or [Path(source).name]
    split = next((tables[name] for name in ("test", "validation") if name in tables), table)
    found = []
    for position, rows_of in enumerate((table, split)):
        labels = list(rows_of["label"]) if "label" in rows_of.column_names else [0] * len(rows_of)
        labels = list(map(values.index, labels)) if values else labels
        if split is table:
            rows = [row for row, held in enumerate(_held_out(labels)) if (held and judged) == bool(position)]
        else:
            rows = list(range(len(rows_of) if judged or not position else 0))
        chosen = _chosen([labels[row] for row in rows], known, names, per_class[position], flag, source)
        taken = [rows[row] for row in chosen]
        files = rows_of.select(taken).select_columns(column).cast_column(column, Encoded(decode=False))[:][column]
        pixels = [
            _pixels(file, size, crop, f"picture {row} of {source}") for row, file in zip(taken, files, strict=True)
        ]
        if len({len(image) for image in pixels}) > 1:
            raise ValueError(f"{flag}: expected grey pictures or RGB ones, got both in {source}; convert them")
        images = torch.stack(pixels) if pixels else torch.empty(0, 1, size, size, dtype=torch.uint8)
        found.append(LabelledImages(images, torch.tensor([labels[row] for row in taken], dtype=torch.long), known))
    _check_parts(*found, source, flag)
    return found


def _check_labels(labels: Iterable[Any], source: str, flag: str) -> None:
    """Raise ValueError where one names no class."""
    for row, value in enumerate(labels):
        if not isinstance(value, int | str) or value == -1:
            raise ValueError(
                f"{flag}: expected a class as the label of every picture of {source}, got {value!r} of picture {row}; "
                "remove it"
            )


def _check_parts(train: LabelledImages, test: LabelledImages, source: str, flag: str) -> None:
    """Raise ValueError where pictures to judge by are of other modes, or of fewer classes, than those to train."""
    if len(test) and train.images.shape[1] != test.images.shape[1]:
        raise ValueError(
            f"{flag}: expected grey pictures or RGB ones, got both in the splits of {source}; convert them"
        )
    unjudged = sorted({*train.labels.tolist()} - {*test.labels.tolist()})
    if len(test) and unjudged:
        raise ValueError(
            f"{flag}: expected pictures to judge by of every class of {source}, got none of "
            f"{train.names[unjudged[0]]}; add some, or name the classes after a colon"
        )


def _held_out(labels: list[int]) -> list[bool]:
    """Of each picture, whether it is one of every fifth of its class, or the last of a class of fewer."""
    counts, seen, found = Counter(labels), Counter(), []
    for label in labels:
        seen[label] += 1
        found.append(seen[label] % HELD_OUT == 0 or 1 < seen[label] == counts[label] < HELD_OUT)
    return found


def _in_folders(folder: str, flag: str) -> bool:
    """Whether pictures lie in folders of classes, and no file says more of them.

    Raises ValueError where some lie beside such folders: `datasets` then drops all classes in silence.
    """
    paths = [path.relative_to(folder) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    pictures = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    deepest = max(pictures, key=lambda path: len(path.parts), default=None)
    stray = next((path for path in pictures if len(path.parts) < len(deepest.parts)), None)
    told = any(path.stem == "metadata" for path in paths)
    if stray is not None and not told:
        raise ValueError(
            f"{flag}: expected a folder a class, or pictures alone, in {folder}; {stray} lies beside folders such as "
            f"{deepest.parent}; move it"
        )
    return deepest is not None and len(deepest.parts) > 1 and not told


def _unnamed(table: Any) -> bool:
    """Whether labels are numbers or texts by themselves, not numbers of names."""
    return "label" in table.column_names and not hasattr(table.features["label"], "names")


def _pixels(file: dict[str, Any], size: int, crop: int | None, name: str) -> Tensor:
    """uint8 [1, size, size] of a grey picture, [3, size, size] of one in RGB. Raises ValueError: another mode."""
    with opened_image(file, name) as opened:
        grey = opened.mode in ("1", "L") or opened.mode.startswith("I;16")
        if not grey and opened.mode != "RGB":
            raise ValueError(
                f"expected a grey picture or one in RGB, got {name} of the mode {opened.mode}; convert it"
            )
        image: Image.Image = to_rgb(opened, name)
    if crop is not None:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        if min(left, top) < 0:
            raise ValueError(f"expected pictures of {crop} pixels or more, got {image.size} in {name}; lower the crop")
        image = image.crop((left, top, left + crop, top + crop))
    pixels = ((crop_to_square(image, size) + 1) * 127.5).round().to(torch.uint8)
    return pixels[:1] if grey else pixels
