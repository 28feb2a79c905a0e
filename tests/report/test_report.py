"""What a run shows: the table, the pictures, the curves and the page that holds them."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from sa_diffusers.report.curves import curves_png, holes_figure
from sa_diffusers.report.metrics_table import metric_rows, metrics_table, request_table
from sa_diffusers.report.page import render
from sa_diffusers.report.pictures import figure, save_before_after
from sa_diffusers.report.run_page import write_report


NASTY = '<script>alert("x")</script> & "seven"'
METRICS = {
    "verdict": {"said": "Forgotten: 1.2 %.", "advice": ""},
    "attribute": "digit",
    "before": {
        "num_images": 2000,
        "retained_accuracy": 0.985,
        "concept_probability": 0.981,
        "attribute_accuracy": {"ink": 0.99, "stroke": 0.97},
        "noise_probability": None,
        "my_own_measure": 0.123456,
    },
    "after": {
        "num_images": 2000,
        "retained_accuracy": 0.98,
        "concept_probability": 0.012,
        "attribute_accuracy": None,
        "noise_probability": 0.083,
        "concept_entropy": 1.5,
    },
    "intervals": {
        "before": {"concept_probability": [0.96, 0.99], "attribute_accuracy": {"ink": [0.98, 1.0]}},
        "after": {"concept_probability": [0.005, 0.02]},
    },
}


def random_image(size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_pairs(size: tuple[int, int] = (32, 32)) -> list[dict]:
    prompts = [("Concept", NASTY), ("Concept", "a seven"), ("Retained", "a three"), ("Not named", "")]
    return [
        {"prompt": prompt, "group": group, "before": random_image(size, 2 * i), "after": random_image(size, 2 * i + 1)}
        for i, (group, prompt) in enumerate(prompts)
    ]


def make_history(num_steps: int = 20) -> list[dict]:
    return [
        {"step": step, "surrogate_loss": 0.3, "replay_loss": 0.1, "ewc": 1e-6 * 2.0**step, "grad_norm": 1.0}
        for step in range(num_steps)
    ]


def make_page(path, **changes) -> str:
    content = {
        "title": NASTY,
        "summary": "Was 98.1 %, is 1.2 %.",
        "metrics": METRICS,
        "prompts": {"concept": [{"prompt": NASTY, "seeds": [1, 2]}]},
        "record": {"Model": NASTY},
        "commands": {"Repeat it": "sa-diffusers forget"},
        "pairs": make_pairs(),
        "history": make_history(),
        "seconds": {"sample": 12.25, "train": 30.0, "total": 42.25, "reused": ["sample"]},
        "config": {"concept": NASTY, "train": {"learning_rate": 1e-4}},
        "fisher": {"num_samples": 96, "unit": None, "scale": 0.123456789},
        "notes": [f"Not proven erased: {NASTY}"],
        **{"sheet": False, "amounts": {}, "choices": (), "requests": None},
    }
    write_report(path, **(content | changes))
    return path.read_text(encoding="utf-8")


def test_page_tells_of_a_chain(tmp_path):
    known = {"date": "2026-01-31", "method": "some", "retained_accuracy": 0.5, "concept_entropy": None}
    table = request_table([{"concept": "nothing", "date": None, "method": None}, {"concept": NASTY} | known], "digit")
    assert table == (
        ["After forgetting", "date", "by", "The other digits"],
        [["nothing", "–", "–", "–"], [NASTY, "2026-01-31", "some", "50.0%"]],
    )
    page = make_page(tmp_path / "page.html", requests=table)
    assert "One request after another" in page and "<td>50.0%</td>" in page and NASTY not in page
    assert "One request after another" not in make_page(tmp_path / "page.html")


def test_page_says_why_a_surrogate_was_chosen(tmp_path):
    shown = [figure({"": random_image()}, "five", "9 nats")]
    chosen = {"said": f"five, not {NASTY}", "figures": shown, "open": "dog (1.2)"}
    page = make_page(tmp_path / "page.html", choices=[chosen])
    assert "Why this surrogate" in page and "9 nats" in page and "dog (1.2)" in page and NASTY not in page
    assert "Why this surrogate" not in make_page(tmp_path / "page.html")


def test_rows_are_ordered_formatted_and_complete():
    rows = {row.label: (row.before, row.after) for row in metric_rows(METRICS)}
    assert rows == {
        "Concept when asked for": ("98.1% [96.0%, 99.0%]", "1.2% [0.5%, 2.0%]"),
        "Entropy when asked for (nats)": ("–", "1.500"),
        "The other digits": ("98.5%", "98.0%"),
        "Attributes: ink": ("99.0% [98.0%, 100.0%]", "–"),
        "Attributes: stroke": ("97.0%", "–"),
        "my_own_measure": ("0.1235", "–"),
    }
    assert list(rows)[0] == "Concept when asked for" and list(rows)[-1] == "my_own_measure"


def test_terminal_table_is_aligned():
    lines = metrics_table(METRICS).splitlines()
    assert len(lines) == 1 + len(metric_rows(METRICS))
    before, after = lines[0].index("before"), lines[0].index("after")
    for line, row in zip(lines[1:], metric_rows(METRICS), strict=True):
        assert line.startswith(row.label)
        assert line[before:after].rstrip() == row.before
        assert line[after:] == row.after


@pytest.mark.parametrize(("size", "tile"), [((32, 32), 128), ((512, 512), 224), ((300, 150), 224)])
def test_picture_sizes(tmp_path, size, tile):
    save_before_after(make_pairs(size), tmp_path / "pairs.png", columns=2)
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert 2 * tile < sheet.width < 2 * tile + 150
        assert 6 * tile < sheet.height < 6 * tile + 500


def test_small_pictures_are_enlarged_without_blur(tmp_path):
    pair = make_pairs()[0]
    save_before_after([pair], tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as sheet:
        pixels = np.asarray(sheet)
    expected = np.asarray(pair["before"]).repeat(4, axis=0).repeat(4, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (128, 128, 3))[:, :, 0]
    assert any((windows[top, left] == expected).all() for top in range(100) for left in range(60, 100))


def test_no_pairs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one pair"):
        save_before_after([], tmp_path / "pairs.png")
    assert not (tmp_path / "pairs.png").exists()


def test_third_panel_appears_with_its_data_and_gaps_are_skipped(tmp_path):
    history = make_history()
    (tmp_path / "two.png").write_bytes(curves_png(history))
    history[0] |= {"ewc": None, "replay_loss": None, "concept_probability": 0.98}
    history[10] |= {"concept_probability": 0.5, "retained_accuracy": 0.97}
    (tmp_path / "three.png").write_bytes(curves_png(history))
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "three.png") as three:
        assert three.width == pytest.approx(1.5 * two.width, abs=2)
        assert three.height == two.height


def test_the_class_that_fares_worst_is_named_on_each_side():
    sides = {
        side: {"retained_worst_accuracy": 0.5, "retained_accuracy_by_class": {"four": four, "nine": 1.5 - four}}
        for side, four in (("before", 0.5), ("after", 1.0))
    }
    (row,) = metric_rows(sides)
    assert (row.before, row.after) == ("50.0% (four)", "50.0% (nine)")
    without = {side: {"retained_worst_accuracy": 0.5} for side in sides}
    assert metric_rows(without)[0].before == "50.0%"


def test_what_was_measured_of_pictures_has_names_and_no_counts():
    side = {
        "forget": {"masked_mse": 0.25, "accuracy": 0.5, "num_images": 4},
        "third, ring": {"masked_mse": 0.5, "num_images": 4},
        "fresh_decoder": {"masked_mse": 1.0, "visible_pixels": 2.0},
    }
    rows = metric_rows({"before": side, "after": side})
    assert [(row.label, row.before) for row in rows] == [
        ("Pictures to forget: error in holes", "0.25"),
        ("Pictures to forget: read as their class", "50.0%"),
        ("Other pictures, ring: error in holes", "0.5"),
        ("New decoder, pictures to forget: error in holes", "1"),
        ("New decoder, pictures to forget: control, visible pixels", "2"),
    ]


@pytest.mark.parametrize("key", ["surrogate_loss", "forget_loss", "retain_loss", "l1"])
def test_the_losses_of_every_objective_are_drawn(key):
    rows = [{"step": step} for step in range(3)]
    assert curves_png([row | {key: 1.0 - row["step"]} for row in rows]) != curves_png(rows)


def test_curves_without_any_value_still_draw(tmp_path):
    (tmp_path / "curves.png").write_bytes(curves_png([{"step": 0, "loss": 1.0, "ewc": 0.0}]))
    (tmp_path / "empty.png").write_bytes(curves_png([]))
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_holes_of_several_sizes_are_curves(tmp_path):
    def side(base: float) -> dict:
        masks = {"": 50, ", left 75": 75, ", left 25": 25, ", ring": 1, ", half": 2}
        return {f"forget{name}": {"masked_mse": base + value, "accuracy": None} for name, value in masks.items()}

    metrics = METRICS | {"before": side(0), "after": side(100), "retrained": side(200), "intervals": {}}
    masks = ["left", "left 75", "left 25", "ring", "half"]
    error, accuracy = holes_figure(metrics, masks).axes
    assert [line.get_xydata().tolist() for line in error.lines] == [
        [[25, base + 25], [50, base + 50], [75, base + 75]] for base in (0, 100, 200)
    ]
    assert [line.get_label() for line in error.lines] == ["forget, before", "forget, after", "forget, retrained"]
    assert error.get_xlabel().startswith("left") and not accuracy.lines
    assert holes_figure(metrics, ["left", "ring", "half"]) is None and holes_figure(METRICS, masks) is None
    pages = [make_page(tmp_path / "report.html", metrics=metrics, config={"eval_masks": part}) for part in (masks, [])]
    assert [page.count("against the size of the hole") for page in pages] == [1, 0]


def test_page_is_self_contained_and_escaped(tmp_path):
    page = make_page(tmp_path / "report.html")
    sources = re.findall(r"""(?:src|srcset|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(sources) == 2 * len(make_pairs()) + 2
    numbers = [source for source in sources if not source.startswith("data:image/png;base64,")]
    (numbers,) = [json.loads(base64.b64decode(n.removeprefix("data:application/json;base64,"))) for n in numbers]
    assert numbers["metrics"]["after"] == METRICS["after"] and NASTY == numbers["prompts"]["concept"][0]["prompt"]
    assert "http" not in page and "@import" not in page
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5  # title twice, caption, configuration, note
    assert len(page) < 1_000_000


def test_page_holds_everything(tmp_path):
    page = make_page(tmp_path / "report.html")
    for row in metric_rows(METRICS):
        assert row.label in page and row.before.split(" [")[0] in page
    for text in ("Concept</h3>", "Retained</h3>", "Not named</h3>", "(empty prompt)", "a three"):
        assert text in page
    for text in (
        "12.2",
        "reused",
        "num_samples",
        "learning_rate",
        "Was 98.1 %",
        "Not proven erased",
        "[96.0%, 99.0%]",
        "<td>0.1235</td>",
        "<td>–</td>",
    ):
        assert text in page
    assert "Undefined" not in page


def test_a_picture_that_stands_alone_has_its_label_as_a_text_only():
    parts = {"targets": {"": [figure({"targets 1": random_image()}, None)]}}
    said = {"columns": ["model"], "rows": [["original"]], "notes": [], "blurred": False, "models": {}, "settings": {}}
    page = render("attack.html.j2", title="An attack", pictures=parts, **said)
    assert 'alt="targets 1"' in page and "<span" not in page


def test_page_of_a_run_that_measured_and_drew_nothing(tmp_path):
    page = make_page(
        tmp_path / "report.html",
        metrics={"before": {}, "after": {}, "verdict": METRICS["verdict"]},
        pairs=[],
        history=[],
        seconds={"train": None},
        fisher=None,
        notes=[],
    )
    for heading in ("Before and after", "Pictures", "Training", "Fisher", "Notes"):
        assert f"<h2>{heading}</h2>" not in page
    assert "Every setting of this run" in page
