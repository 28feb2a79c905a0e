"""Files as people have them: prompts, tables, YAML and pictures of every encoding and form."""

import csv
import gzip
import json
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sa_diffusers.core.concepts import Concept
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.i2p import load_i2p
from sa_diffusers.data.images import CaptionedImageFolder, image_paths, image_size, read_image
from sa_diffusers.data.prompts import read_labelled_prompts, read_prompts, within_limit
from sa_diffusers.data.sampling import Request
from sa_diffusers.io.configuration import read_yaml


WANTED = ["a red six", "a café, at night", "7"]
CSV = 'prompt,evaluation_seed\na red six,1\n"a café, at night",2\n7,3\n'
JSONL = "".join(json.dumps({"prompt": text}) + "\n" for text in WANTED)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("p.txt", "\n".join(WANTED), id="text"),
        pytest.param("p.txt", b"\xef\xbb\xbf# a comment\n" + "\n".join(WANTED).encode(), id="byte-order mark"),
        pytest.param("p.txt", "\r\n".join(WANTED), id="lines of Windows"),
        pytest.param("p.txt", "\r".join(WANTED), id="lines of old Macs"),
        pytest.param("P.TXT", "\n".join(WANTED), id="capital suffix"),
        pytest.param("p.txt.gz", gzip.compress("\n".join(WANTED).encode()), id="compressed text"),
        pytest.param("p.csv", CSV, id="csv"),
        pytest.param("P.CSV", CSV, id="capital csv"),
        pytest.param("p.csv", b"\xef\xbb\xbf" + CSV.encode(), id="csv of Excel"),
        pytest.param("p.csv", CSV.replace("\n", "\r\n"), id="csv of Windows"),
        pytest.param("p.csv", CSV + "\n\n", id="csv with blank lines at its end"),
        pytest.param("p.csv.gz", gzip.compress(CSV.encode()), id="compressed csv"),
        pytest.param("p.tsv", "prompt\tseed\na red six\t1\na café, at night\t2\n7\t3\n", id="tsv"),
        pytest.param("p.csv", ',prompt,\n0,a red six,x\n1,"a café, at night",\n2,7,\n', id="csv of pandas"),
        pytest.param("p.jsonl", JSONL, id="jsonl"),
        pytest.param("p.jsonl", JSONL.replace("\n", "\n\n"), id="jsonl with blank lines"),
        pytest.param("p.jsonl", JSONL.replace('"7"', "7"), id="jsonl with a number"),
        pytest.param("p.jsonl", JSONL + '{"prompt": null}\n{"seed": 3}\n', id="jsonl with nothing in some rows"),
        pytest.param("p.json", json.dumps([{"prompt": text} for text in WANTED], indent=2), id="json list of objects"),
        pytest.param("p.json", json.dumps(WANTED), id="json list of texts"),
        pytest.param("p.json", json.dumps({"prompt": WANTED, "seed": [1, 2, 3]}), id="json of columns"),
        pytest.param("p.json", JSONL, id="json lines in .json"),
        pytest.param("p.jsonl.gz", gzip.compress(JSONL.encode()), id="compressed jsonl"),
    ],
)
def test_prompts_are_read_as_they_are(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_prompts(str(path)) == WANTED


def test_a_line_separator_within_json_is_no_end_of_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["a\u2028b", "c"]


def test_a_parquet_file_and_a_folder(tmp_path):
    pd.DataFrame({"prompt": WANTED}).to_parquet(tmp_path / "P.parquet")
    assert read_prompts(str(tmp_path / "P.parquet")) == read_prompts(str(tmp_path)) == WANTED


REFUSED = [
    pytest.param("p.txt", b"\xff\xfea\0 \0", ("UTF-16", "save it as UTF-8"), id="UTF-16"),
    pytest.param("p.txt", "a six".encode("utf-16-le"), ("UTF-16",), id="UTF-16 without its mark"),
    pytest.param("p.txt", b"a six\na caf\xe9\n", ("line 2", "0xe9", "latin-1"), id="latin-1"),
    pytest.param("p.csv", b"prompt\na caf\xe9\n", ("line 2", "latin-1"), id="latin-1 csv"),
    pytest.param("p.txt", "# only\n\n", ("no prompt in",), id="nothing but comments"),
    pytest.param("p.txt", b"", ("no prompt in",), id="empty text"),
    pytest.param(
        "p.csv",
        "prompt,seed\na six, seven and nine,1\n",
        ("line 2", "expected 2 values", "got 3", "quotes"),
        id="commas without quotes",
    ),
    pytest.param(
        "p.csv", "prompt\na six, seven\n", ("line 2", "expected 1 values", "got 2"), id="commas in the only column"
    ),
    pytest.param("p.csv", "prompt,seed\na six,1\na nine\n", ("line 3", "got 1"), id="short row"),
    pytest.param("p.csv", 'prompt,seed\na six,1\n"a nine,2\n', ("line 3", "quotes"), id="quote without its end"),
    pytest.param("p.csv", 'prompt\n"a "red" six"\n', ("line 2", "quotes"), id="quotes within quotes"),
    pytest.param("p.csv", "prompt;seed\na six;1\n", ("line 1", "','", "prompt;seed"), id="semicolons"),
    pytest.param("p.csv", "", ("p.csv", "empty"), id="empty csv"),
    pytest.param("p.csv", "prompt\n", ("no prompt in",), id="csv without rows"),
    pytest.param("p.csv", "a red six\na nine\n", ("'a red six'", "--prompt_column"), id="csv without a header"),
    pytest.param("p.csv", "caption\na six\n", ("caption", "'prompt'", "--prompt_column"), id="another column"),
    pytest.param("p.jsonl", "", ("has columns []",), id="empty jsonl"),
    pytest.param("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', ("line 2", "JSON object"), id="broken line"),
    pytest.param("p.json", '[{"prompt": "a"}, {"prompt": "b"', ("no valid JSON", "p.json"), id="broken json"),
    pytest.param("p.json", "[" * 100_000, ("no valid JSON",), id="json nested too deep"),
    pytest.param(
        "p.jsonl",
        '{"prompt": ["a", "b"]}\n{"prompt": "c"}\n',
        ("line 1", "['a', 'b']", "'prompt'"),
        id="list in a row",
    ),
    pytest.param("p.jsonl", '{"prompt": "a"}\n{"prompt": true}\n', ("line 2", "True"), id="truth value"),
    pytest.param("p.jsonl", '{"prompt": 1.5}\n{"prompt": "a"}\n', ("line 1", "1.5"), id="fraction"),
    pytest.param("p.jsonl", '["a"]\n["b"]\n', ("line 1", "expected a JSON object"), id="lists for rows"),
    pytest.param("p.json", "7", ("line 1", "expected a JSON object"), id="a number"),
    pytest.param(
        "p.json", json.dumps({"prompt": ["a"], "seed": []}), ("one length",), id="columns of several lengths"
    ),
    pytest.param("p.csv.gz", b"prompt\na six\n", ("no whole gzip file",), id="gz that is none"),
    pytest.param("p.csv.gz", gzip.compress(CSV.encode())[:-12], ("no whole gzip file",), id="gz cut off"),
    pytest.param("p.parquet", b"PAR1 garbage", ("p.parquet", "no readable .parquet"), id="broken parquet"),
    pytest.param("p.xlsx", b"PK\3\4", (".csv", "p.xlsx", "convert"), id="Excel"),
    pytest.param("p.md", "a six", (".txt", "p.md"), id="another kind of file"),
    pytest.param("p.csv.zip", b"PK\3\4", ("p.csv.zip", ".gz"), id="zip"),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSED)
def test_files_of_prompts_are_refused_before_the_model_is_looked_for(refused, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(
        "forget",
        "--concept",
        "seven",
        "--surrogate",
        "nine",
        "--model",
        "no/such",
        "--replay_prompts",
        name,
        says=says,
    )


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        pytest.param("--replay_prompts", "none.txt", ("no file none.txt",), id="missing text"),
        pytest.param("--replay_prompts", "none.csv.gz", ("no file none.csv.gz",), id="missing table"),
        pytest.param("--replay_prompts", "", ("empty name",), id="empty name"),
        pytest.param("--replay_prompts", "empty", ("empty",), id="empty folder"),
        pytest.param("--concept_templates", "none.txt", ("no file none.txt",), id="missing templates"),
        pytest.param(
            "--concept_templates", "plain.txt", ("must hold {}", "'a photo'"), id="templates without a place"
        ),
        pytest.param("--eval_prompts", "plain.txt", ("plain.txt, line 1", "JSON object"), id="labels in plain text"),
        pytest.param("--eval_prompts", "number.jsonl", ("number.jsonl, line 1", "in text"), id="labels in numbers"),
    ],
)
def test_names_of_files_are_looked_at_before_the_model(refused, tmp_path, flag, value, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain.txt").write_text("a photo\n")
    (tmp_path / "number.jsonl").write_text('{"prompt": "a 7", "form": "seen", "digit": 7}\n')
    refused("forget", "--concept", "seven", "--surrogate", "nine", "--model", "no/such", flag, value, says=says)


def test_labelled_prompts_may_end_in_blank_lines(tmp_path):
    row = {"prompt": "a 7", "form": "seen", "digit": "seven"}
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n")
    assert read_labelled_prompts(str(tmp_path / "p.jsonl")) == [row]


# Prompts with seeds


BIG = 4026076402  # more than 31 bits, as many of I2P's


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"prompt": ["a", "b"], "categories": ["hate", "3"], "sd_seed": [BIG, 0]}, id="I2P"),
        pytest.param(
            {"prompt": ["a", "b"], "categories": [3, 4], "sd_seed": [float(BIG), 0.0]}, id="numbers for words"
        ),
        pytest.param({"case_number": [0, 1], "prompt": ["a", "b"], "evaluation_seed": [BIG, 0]}, id="ESD, MACE"),
        pytest.param(
            {"": [0, 1], "prompt": ["a", "b"], "evaluation_seed": [BIG, 0], "evaluation_guidance": [7.5, 7.5]},
            id="attacks",
        ),
        pytest.param({"prompt": ["a", "b"], "seed": [BIG, 0]}, id="plain"),
        pytest.param(
            {"prompt": ["a", "b"], "sd_seed": [BIG, 0], "evaluation_seed": [1, 2]}, id="I2P's own come first"
        ),
    ],
)
def test_the_columns_that_the_files_of_the_field_have(tmp_path, columns):
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    assert load_i2p(str(tmp_path / "p.csv")) == [Request(Condition("a"), BIG), Request(Condition("b"), 0)]


def test_lists_of_categories_in_json(tmp_path):
    rows = [{"prompt": "a", "categories": ["hate", "x"], "sd_seed": 3}, {"prompt": "b", "categories": 4, "sd_seed": 4}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_i2p(str(tmp_path / "p.jsonl")) == [Request(Condition("a"), 3), Request(Condition("b"), 4)]


@pytest.mark.parametrize("seed", ["", "-1", "1.5", "x", "nan", "inf", str(2**64), "1e400"])
def test_seeds_that_are_none_are_told_by_their_line(tmp_path, seed):
    (tmp_path / "p.csv").write_text(f"prompt,evaluation_seed\na,1\nb,{seed}\n")
    with pytest.raises(ValueError, match="p.csv, line 3: expected in evaluation_seed a whole number"):
        load_i2p(str(tmp_path / "p.csv"))


# Templates


def test_templates_whose_concept_is_cut_off_are_left_out(tiny_tokenizer):
    concept, far = Concept(("seven", "7"), "nine"), "a red six on black, a green nine on white, a {}"
    near = ["a {}", "a {} and then a red six on black and much that is cut"]
    assert within_limit([near[0], far, near[1]], concept, tiny_tokenizer) == near
    with pytest.raises(ValueError, match="no template has 'seven' within the 12 tokens"):
        within_limit([far], concept, tiny_tokenizer)


# YAML


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("concept: [a\n", ("c.yaml", "not valid YAML"), id="bracket"),
        pytest.param("concept: a\n\tsurrogate: b\n", ("c.yaml", "not valid YAML"), id="tab"),
        pytest.param("- a\n- b\n", ("c.yaml", "option: value"), id="list"),
        pytest.param("seed: !!bool 2\n", ("c.yaml", "not valid YAML"), id="tag with another value"),
        pytest.param("seed: 2026-13-45\n", ("c.yaml", "not valid YAML"), id="date that is none"),
        pytest.param("concept: 2026-01-02\n", ("concept", "expected str"), id="date"),
        pytest.param("? [a]\n: b\n", ("c.yaml", "not valid YAML"), id="list for a key"),
        pytest.param("concept: \xe9".encode("latin-1"), ("c.yaml", "latin-1"), id="latin-1"),
        pytest.param("concept: a".encode("utf-16"), ("c.yaml", "UTF-16"), id="UTF-16"),
        pytest.param("concept: " + "[" * 600, ("c.yaml", "not valid YAML"), id="nested too deep"),
        pytest.param(
            "concept: a\nlearning_rate: fast\n", ("c.yaml", "learning_rate", "float"), id="word for a number"
        ),
        pytest.param("a: &a [x]\nb: &b [*a, *a]\nconcept: [*b, *b]\n", ("c.yaml", "'a'"), id="aliases"),
        pytest.param("null: 3\n", ("c.yaml", "None"), id="null for a key"),
    ],
)
def test_broken_yaml_is_refused_by_its_name(refused, tmp_path, content, says):
    (tmp_path / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("forget", "--config", "c.yaml", says=says)


def test_yaml_with_a_byte_order_mark_and_an_empty_one(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfconcept: seven\r\nsurrogate: nine\r\n")
    (tmp_path / "b.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "a.yaml") == {"concept": "seven", "surrogate": "nine"}
    assert read_yaml(tmp_path / "b.yaml") == {}


# Pictures


def test_sixteen_bits_of_grey_keep_their_range(tmp_path):
    values = np.array([[0, 1000], [30_000, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    expected = torch.from_numpy((values / 65_535).astype(np.float64)) * 2 - 1
    found = read_image(tmp_path / "deep.png").double()
    torch.testing.assert_close(found, expected.expand(3, 2, 2), rtol=0, atol=1 / 127.5)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep.png", "text": "a ramp"}\n')
    data = CaptionedImageFolder(str(tmp_path), 2)
    torch.testing.assert_close(data.image(0).double(), expected.expand(3, 2, 2), rtol=0, atol=1 / 127.5)


def huge_png(side: int) -> bytes:
    """The header of a picture of so many pixels a side, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    end = b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, end)
    )


def red(path, **options):
    Image.new("RGB", (16, 16), (255, 0, 0)).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.tiff", "a.TIF", "a.avif", "a.jfif", "a.jpg", "a.webp", "a.bmp"])
def test_pictures_beside_a_png_are_seen(tmp_path, name):
    red(tmp_path / "b.png")
    red(tmp_path / name)
    for other in ("._b.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / other).write_bytes(b"\0\1")
    assert [path.name for path in image_paths(tmp_path)] == [name, "b.png"]
    torch.testing.assert_close(read_image(tmp_path / name)[:, 8, 8], torch.tensor([1.0, -1, -1]), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        pytest.param("a.png", huge_png(20_000), ("a.png", "too large"), id="400 megapixels"),
        pytest.param("a.png", huge_png(20), ("a.png", "no readable image"), id="no pixels"),
        pytest.param("a.png", b"", ("a.png", "no readable image"), id="empty"),
        pytest.param("a.jpg", b"<html>404</html>", ("a.jpg", "no readable image"), id="a web page"),
        pytest.param("a.heic", b"ftypheic", ("a.heic", "cannot be read", ".png"), id="a phone's"),
        pytest.param("a.svg", b"<svg/>", ("a.svg", "cannot be read"), id="a drawing"),
    ],
)
def test_pictures_of_a_surrogate_are_refused_at_the_start(refused, tmp_path, tiny_pipeline_dir, name, content, says):
    (tmp_path / "pictures").mkdir()
    red(tmp_path / "pictures" / "b.png")
    (tmp_path / "pictures" / name).write_bytes(content)
    refused("forget", "--concept", "seven", "--surrogate", "./pictures", "--model", tiny_pipeline_dir, says=says)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_other_pictures_that_move_are_refused_too(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ValueError, match="expected one picture, got 2 frames"):
        read_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize(("name", "mode"), [("a.tif", "RGB"), ("a.jpg", "RGB"), ("a.png", "I;16")])
def test_a_turned_picture_is_upright_and_of_that_size(name, mode, tmp_path):
    pixels = np.zeros((4, 8) if mode != "RGB" else (4, 8, 3), dtype=np.uint16 if mode != "RGB" else np.uint8)
    pixels[:, :4] = 65535 if mode != "RGB" else 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: what is left comes to the top
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    read = read_image(tmp_path / name)
    assert tuple(read.shape[1:]) == image_size(tmp_path / name) == (8, 4)
    assert read[:, :3].min() > 0.9 and read[:, 5:].max() < -0.9


def test_a_gif_that_moves_is_refused(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (0, 120, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="expected one picture, got 3 frames in .*a.gif"):
        read_image(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        pytest.param('{"file_name": "1.png", "text": null}', "1.png, got None", id="null"),
        pytest.param('{"file_name": "1.png", "text": 7}', "1.png, got 7", id="number"),
        pytest.param('{"file_name": "1.png", "text": ["a"]}', "1.png, got \\['a'\\]", id="list"),
        pytest.param('{"file_name": "2.png", "text": "a"}', "2.png", id="missing file"),
        pytest.param('{"file_name": "3.png", "text": "a"}', "3.png is no readable image", id="broken file"),
        pytest.param('{"file_name": "1.png", "caption": "a"}', "lacks the column text", id="another column"),
        pytest.param('{"file_name": "1.png", "text": "a"', "cannot be loaded", id="broken line"),
        pytest.param(
            '{"file_name": "1.png", "text": 7}\n{"file_name": "1.png", "text": "b"}',
            "number to string",
            id="of two types",
        ),
    ],
)
def test_captions_and_files_are_looked_at_before_training(tmp_path, metadata, message):
    red(tmp_path / "1.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "metadata.jsonl").write_text(metadata + "\n")
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        CaptionedImageFolder(str(tmp_path), 8)
    assert str(tmp_path) in str(caught.value)
