"""Pictures for the eye: tensors as images, sheets of many, before above after, and images inside a page."""

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from sa_diffusers.io.atomic_files import atomic_path


SMALL = 128  # pixels a side up to which a picture is enlarged rather than reduced
LARGEST = 256  # pixels a side of a picture inside a page
SMALLEST = 32  # pixels a side of a picture on a contact sheet
MOSAIC = 8  # tiles a side of a blurred one, fewer of small ones: what they hide is not in the file


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] to a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def contact_sheet(images: Tensor, columns: int = 8) -> Image.Image:
    """[-1, 1] images [N, 3, H, W] in rows of `columns`; small ones are enlarged by a whole factor, for the eye."""
    factor = max(1, SMALLEST // images.shape[-1])
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    sheet[:count] = to_uint8(images)
    grid = sheet.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return to_pil(grid.reshape(channels, rows * height, columns * width))


def save_contact_sheet(images: Tensor, path: str | Path, columns: int = 8) -> None:
    """Save `contact_sheet(images, columns)`, atomically, in the format of the path's suffix."""
    with atomic_path(path) as new:
        contact_sheet(images, columns).save(new)


def mosaic(image: Image.Image) -> Image.Image:
    """The picture as mean colours of at most `MOSAIC` x `MOSAIC` tiles, smoothed, in its own size.

    A tile is at least 8 pixels a side, so that small pictures are also hidden.
    """
    tiles = [max(1, min(MOSAIC, side // 8)) for side in image.size]
    return image.resize(tiles, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def data_uri(png: bytes) -> str:
    """A PNG file as the source of an <img>."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def embed(image: Image.Image, blurred: bool = False) -> dict[str, Any]:
    """A picture for a page: {"uri": its source, at most `LARGEST` pixels a side, "small": for the browser to enlarge}.

    Args:
        blurred: embed no more than its `mosaic`.
    """
    small, buffer = max(image.size) <= SMALL, io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) > LARGEST:
        image = ImageOps.contain(image, (LARGEST, LARGEST), Image.Resampling.LANCZOS)
    (mosaic(image) if blurred else image).save(buffer, format="PNG")
    return {"uri": data_uri(buffer.getvalue()), "small": small}


def figure(
    images: Mapping[str, Image.Image], prompt: str | None, remark: str = "", blurred: bool = False
) -> dict[str, Any]:
    """Pictures beside each other, by their labels, as a page's strip takes them; see `embed`.

    Args:
        prompt, remark: the caption; None: there is none.
    """
    tiles = [{"label": label, **embed(image, blurred)} for label, image in images.items()]
    return {"tiles": tiles, "prompt": prompt, "remark": remark}


def by_group(pairs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Pairs by their "group", groups in the order of their first appearance."""
    names = dict.fromkeys(pair["group"] for pair in pairs)
    return {name: [pair for pair in pairs if pair["group"] == name] for name in names}


def first_of_each(pairs: Sequence[Mapping[str, Any]], count: int = 8) -> list[Mapping[str, Any]]:
    """The first pairs of every group."""
    return [pair for group in by_group(pairs).values() for pair in group[:count]]


def save_before_after(pairs: Sequence[Mapping[str, Any]], path: str | Path, columns: int = 8) -> None:
    """Save `before_after(pairs, columns)` as a PNG file, atomically."""
    sheet = before_after(pairs, columns)
    with atomic_path(path) as new:
        sheet.save(new, format="PNG")


def before_after(pairs: Sequence[Mapping[str, Any]], columns: int = 8) -> Image.Image:
    """One picture of all pairs, group by group.

    Args:
        pairs: {"prompt": str, "group": str, "before": PIL image, "after": PIL image}, any sizes.
        columns: pairs side by side.

    Raises ValueError without a pair or a column.
    """
    if not pairs or columns < 1:
        raise ValueError(f"Expected at least one pair and one column, got {len(pairs)} pairs and {columns} columns.")
    large = max(max(pair[side].size) for pair in pairs for side in ("before", "after")) > SMALL
    tile, left, heading = (224 if large else SMALL), 76, 44
    strip = 2 * tile + 84
    groups = by_group(pairs)
    num_strips = sum(math.ceil(len(group) / columns) for group in groups.values())
    width = left + min(columns, max(map(len, groups.values()))) * (tile + 12) + 12
    sheet = Image.new("RGB", (width, len(groups) * heading + num_strips * strip + 12), "white")
    top = 0
    for name, group in groups.items():
        top += heading
        ImageDraw.Draw(sheet).text((left, top - 8), name, fill="black", font=_font(17, bold=True), anchor="ls")
        for start in range(0, len(group), columns):
            _draw_strip(sheet, group[start : start + columns], top, tile, left)
            top += strip
    return sheet


def _draw_strip(sheet: Image.Image, pairs: Sequence[Mapping[str, Any]], top: int, tile: int, left: int) -> None:
    """Draw one row of pairs, before above after, captions below, from the height `top` down."""
    draw, font = ImageDraw.Draw(sheet), _font(12)
    for row, side in enumerate(("before", "after")):
        middle = top + row * (tile + 4) + tile // 2
        draw.text((left - 12, middle), side, fill="#555", font=font, anchor="rm")
        for column, pair in enumerate(pairs):
            image = _fit(pair[side].convert("RGB"), tile)
            x = left + column * (tile + 12) + (tile - image.width) // 2
            sheet.paste(image, (x, middle - image.height // 2))
    for column, pair in enumerate(pairs):
        width = int(tile / font.getlength("n"))
        lines = textwrap.wrap(pair["prompt"] or "(empty prompt)", width, max_lines=4, placeholder=" …")
        corner = left + column * (tile + 12), top + 2 * tile + 10
        draw.multiline_text(corner, "\n".join(lines), fill="#222", font=font, spacing=3)


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Bring a picture into a square of `size` pixels: small ones by whole factors, so that their pixels stay sharp."""
    factor = size // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own font: it comes with the package and knows more scripts than Pillow's."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)
