"""What a run shows: pictures before and after, curves, a table of metrics, and one page that holds them all."""

import base64
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sa_diffusers.io.atomic_files import atomic_path


SMALL = 128  # pixels a side up to which a picture is enlarged rather than reduced
TEMPLATES = Path(__file__).parent / "templates"

# key in metrics.json: (label, format, what it says). Rates are fractions of 1, shown in per cent.
METRICS = {
    "concept_probability": ("Concept when asked for", ".1%", "Its probability in pictures that ask for it."),
    "concept_probability_unseen": ("Concept, unseen phrasings", ".1%", "The same for words the forgetting never saw."),
    "concept_rate_when_unnamed": ("Concept when not named", ".1%", "Share of pictures that show it all the same."),
    "concept_entropy": ("Entropy when asked for (nats)", ".3f", "How undecided the classifier is about them."),
    "noise_probability": (
        "Concept in pure noise",
        ".1%",
        "The classifier's answer to noise: compare the above with it where noise is the surrogate.",
    ),
    "noise_entropy": ("Entropy of pure noise (nats)", ".3f", "How undecided the classifier is about noise."),
    "grey_probability": ("Concept in flat grey", ".1%", "The classifier's answer to a picture without any content."),
    "grey_entropy": ("Entropy of flat grey (nats)", ".3f", "How undecided the classifier is about it."),
    "retained_accuracy": ("Retained concepts", ".1%", "Share of pictures of other concepts that show what was asked."),
    "retained_worst_accuracy": ("Worst retained concept", ".1%", "The same for the concept that fares worst."),
    "retained_probability": ("Probability of retained", ".1%", "Of the class that was asked for."),
    "retained_worst_probability": ("Probability, worst retained", ".1%", "The same for the class that fares worst."),
    "attribute_accuracy": ("Attributes", ".1%", "Share of pictures with the attribute that was asked for."),
    "concept_attribute_accuracy": (
        "Attributes, concept asked for",
        ".1%",
        "The same where the forgotten word is asked for.",
    ),
    "replay_loss": ("Loss on replay samples", ".4f", "Denoising error on the model's own samples of everything else."),
    "classifier_accuracy": ("Classifier", ".1%", "Its accuracy on real pictures: how far to trust the rest."),
    "num_images": ("Pictures drawn", ",.0f", "Generated pictures behind these numbers."),
}

# title of a panel: {key in the history: label of its line}
PANELS = {
    "Loss": {"surrogate_loss": "surrogate", "replay_loss": "replay"},
    "EWC": {"ewc_penalty": "EWC"},
    "Forgetting": {"concept_probability": "concept probability", "retained_accuracy": "retained accuracy"},
}


class MetricRow(NamedTuple):
    """One line of the table, ready to print."""

    label: str
    explanation: str
    before: str
    after: str


def _part(values: Mapping[str, Any], key: str, part: str | None) -> Any:
    """values[key], or values[key][part] where that is a dict; None where there is none."""
    value = values.get(key)
    return value.get(part) if isinstance(value, Mapping) else value


def _cell(value: Any, interval: Sequence[float] | None, spec: str) -> str:
    """Format a value and its 95 % interval: 0.975, [0.96, 0.99] -> "97.5% [96.0%, 99.0%]"."""
    if not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:{spec}}" + (f" [{interval[0]:{spec}}, {interval[1]:{spec}}]" if interval else "")


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """Turn metrics into table lines: known keys first, in a fixed order, then others under their own names.

    Args:
        metrics: {"before": {key: value}, "after": {...}} with values that are numbers, None, or dicts of them (a line
            each), and optionally "intervals": {"before": {key: [low, high]}, "after": {...}}.
    """
    intervals = metrics.get("intervals", {})
    sides = [(metrics[side], intervals.get(side, {})) for side in ("before", "after")]
    present = dict.fromkeys(key for values, _ in sides for key in values)
    rows = []
    for key in [*filter(present.__contains__, METRICS), *(key for key in present if key not in METRICS)]:
        label, spec, explanation = METRICS.get(key, (key, ".4g", ""))
        nested = [values[key] for values, _ in sides if isinstance(values.get(key), Mapping)]
        parts = dict.fromkeys(part for values in nested for part in values)
        for part in parts or [None]:
            if all(_part(values, key, part) is None for values, _ in sides):
                continue  # nothing was measured, as without a classifier
            cells = [_cell(_part(values, key, part), _part(bounds, key, part), spec) for values, bounds in sides]
            rows.append(MetricRow(label if part is None else f"{label}: {part}", explanation, *cells))
    return rows


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The table of `metric_rows` as aligned plain text for a terminal, without the explanations."""
    lines = [("", "before", "after"), *((row.label, row.before, row.after) for row in metric_rows(metrics))]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _groups(pairs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Pairs by group, groups in the order of their first appearance."""
    names = dict.fromkeys(pair["group"] for pair in pairs)
    return {name: [pair for pair in pairs if pair["group"] == name] for name in names}


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


def save_before_after(pairs: Sequence[Mapping[str, Any]], path: str | Path, columns: int = 8) -> None:
    """Save one picture of all pairs, group by group.

    Args:
        pairs: {"prompt": str, "group": str, "before": PIL image, "after": PIL image}, any sizes.
        path: PNG to write.
        columns: pairs side by side.

    Raises ValueError without a pair or a column.
    """
    if not pairs or columns < 1:
        raise ValueError(f"Expected at least one pair and one column, got {len(pairs)} pairs and {columns} columns.")
    large = max(max(pair[side].size) for pair in pairs for side in ("before", "after")) > SMALL
    tile, left, heading = (224 if large else SMALL), 76, 44
    strip = 2 * tile + 84
    groups = _groups(pairs)
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
    with atomic_path(path) as new:
        sheet.save(new, format="PNG")


def _curves_png(history: Sequence[Mapping[str, Any]], dark: bool = False) -> bytes:
    """Draw the panels of PANELS against the step; the last only when the history knows its values."""
    keys = [key for lines in PANELS.values() for key in lines]
    series = {key: [(row["step"], row[key]) for row in history if row.get(key) is not None] for key in keys}
    panels = [title for title, lines in PANELS.items() if title != "Forgetting" or any(map(series.get, lines))]
    with matplotlib.style.context("dark_background" if dark else "default"):
        figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained")
        for axes, title in zip(figure.subplots(1, len(panels)), panels, strict=True):
            axes.set(title=title, xlabel="optimiser step")
            axes.grid(alpha=0.25)
            for key, label in PANELS[title].items():
                if series[key]:
                    axes.plot(*zip(*series[key], strict=True), label=label, linewidth=1.4)
            if axes.lines:
                axes.legend(frameon=False)
            else:
                axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
            if title == "EWC" and (positive := [value for _, value in series["ewc_penalty"] if value > 0]):
                axes.set_yscale("log" if max(positive) > 100 * min(positive) else "linear")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def save_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Save the training curves as a PNG: losses, EWC (log scale over two decades) and, where recorded, forgetting.

    Args:
        history: {"step": int, "surrogate_loss", "replay_loss", "ewc_penalty", "concept_probability",
            "retained_accuracy"}; a value that is missing or None leaves a gap, other keys are ignored.
        path: PNG to write.
    """
    with atomic_path(path) as new:
        new.write_bytes(_curves_png(history))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _picture(image: Image.Image) -> dict[str, Any]:
    """A picture for the page, at most 256 pixels a side; the browser enlarges small ones."""
    small, buffer = max(image.size) <= SMALL, io.BytesIO()
    (image.convert("RGB") if small else _fit(image.convert("RGB"), 256)).save(buffer, format="PNG")
    return {"uri": _data_uri(buffer.getvalue()), "small": small}


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str,
    metrics: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, Any],
    config: Mapping[str, Any],
    fisher: Mapping[str, Any] | None,
    notes: Sequence[str],
    amounts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write one HTML page that needs nothing else: no network, no script, pictures inside.

    Args:
        summary: the result in words.
        metrics: see `metric_rows`.
        pairs, history: see `save_before_after` and `save_curves`; may be empty.
        seconds: wall-clock seconds by stage; a list under "reused" names the stages that were not computed again.
        config, fisher: the resolved configuration; the Fisher's metadata or None.
        notes: warnings and limits, one sentence each.
        amounts: {stage: {"count", "of", "per_second"}}, what each stage worked through.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    pictures = [{**pair, "before": _picture(pair["before"]), "after": _picture(pair["after"])} for pair in pairs]
    page = environment.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        rows=metric_rows(metrics),
        with_intervals="intervals" in metrics,
        groups=_groups(pictures),
        curves={theme: _data_uri(_curves_png(history, theme == "dark")) for theme in ("light", "dark")},
        history=history,
        seconds=seconds,
        amounts=amounts or {},
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
        fisher=fisher,
        notes=notes,
    )
    with atomic_path(path) as new:
        new.write_text(page, encoding="utf-8")
