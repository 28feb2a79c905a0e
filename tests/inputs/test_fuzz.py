"""Whatever a file or a list of concepts holds: an answer, or an error in words; no other exception, and no hang."""

import json
import string
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sa_diffusers.core.concepts import Concept, fold, mentions, split_phrasings, substitute
from sa_diffusers.data.concepts.given import check_surrogate, describe_surrogate, find_concept
from sa_diffusers.data.i2p import load_i2p
from sa_diffusers.data.images import read_image
from sa_diffusers.data.prompts import read_labelled_prompts, read_prompts, read_templates, template_of
from sa_diffusers.io.configuration import config_from_dict, config_to_yaml, read_values
from sa_diffusers.io.model_names import folder_name
from sa_diffusers.runs.options import ForgetConfig


pytestmark = pytest.mark.slow
SAID = (ValueError, FileNotFoundError)  # what every reader may raise
many = settings(
    max_examples=400,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Text that looks like tables, YAML and JSON far more often than chance would make it.
signs = st.text(st.sampled_from(string.printable + "é猫\u00a0\u2028\ufeff{}[]\"',:;&*!|>-#%@~\t\n"), max_size=200)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
rows = st.dictionaries(st.sampled_from(["prompt", "sd_seed", "form", "digit", "categories"]), values, max_size=4)
tables = st.lists(st.lists(st.text(max_size=12), min_size=1, max_size=4), max_size=5).map(
    lambda lines: "prompt,seed\n" + "\n".join(",".join(line) for line in lines)
)
contents = st.binary(max_size=200) | st.one_of(
    signs,
    tables,
    st.text(max_size=200),
    st.lists(rows, max_size=4).map(lambda found: "\n".join(json.dumps(row, default=str) for row in found)),
    values.map(lambda value: json.dumps(value, default=str)),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


@many
@given(contents, st.sampled_from(["p.txt", "p.csv", "P.TSV", "p.json", "p.jsonl", "p.csv.gz", "p.md", "p"]))
@example(b'{"prompt": ' + b"[" * 100_000, "p.jsonl")
@example(b"prompt\n" + b'"' * 200_000, "p.csv")
@example(b'{"prompt": ' + b"9" * 10_000 + b"}", "p.jsonl")
def test_files_of_prompts(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_prompts, read_templates, load_i2p, read_labelled_prompts):
        if read is read_labelled_prompts or path.suffix:
            try:
                found = read(str(path))
            except SAID as error:
                assert str(error)
            else:
                assert isinstance(found, list)
    if name == "p.txt":
        try:
            assert all(line == line.strip() and line for line in read_prompts(str(path)))
        except SAID:
            pass


@many
@given(contents | values.map(lambda value: json.dumps({"concept": value}, default=str).encode()))
@example(b"concept: !!bool 2")
@example(b"concept: !!timestamp x")
@example(b"seed: 0b_")
@example(b"concept: " + b"[" * 600)
@example(b"a: &a [*a, *a]\nconcept: *a")
def test_yaml(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    try:
        found = config_from_dict(ForgetConfig, read_values(ForgetConfig, str(tmp_path / "c.yaml")))
    except ValueError as error:
        assert len(str(error)) < 2000
    else:
        config_to_yaml(found, tmp_path / "again.yaml")
        assert config_from_dict(ForgetConfig, read_values(ForgetConfig, str(tmp_path / "again.yaml"))) == found


words = st.text(max_size=30) | st.text(st.sampled_from("seven 7,-_'’猫ß.{}/~\u00a0e\u0301"), max_size=20)


@many
@given(words, words | st.none(), words, st.booleans())
def test_lists_of_concepts(concept, surrogate, prompt, plurals):
    try:
        found = find_concept(concept, surrogate, None, plurals)
    except ValueError:
        assert "{}" in concept or not any(fold(part) for part in concept.split(","))
        return
    assert found.phrasings == split_phrasings(concept) and all(map(fold, found.phrasings))
    name = folder_name(found.name)
    assert Path(name).name == name and 0 < len(name.encode()) <= 100 and name not in (".", "..")
    try:
        check_surrogate(found)
    except ValueError:
        return
    assert not found.named_in(found.surrogate) or found.surrogate_kind == "images"
    assert describe_surrogate(found)


@many
@given(words, st.lists(words, max_size=3), st.booleans())
def test_what_names_the_concept_is_replaced(prompt, phrases, plurals):
    replaced = substitute(prompt, dict.fromkeys(phrases, "\N{BULLET}"), plurals)
    assert (replaced != prompt) == mentions(prompt, phrases, plurals) or "\N{BULLET}" in prompt
    if phrases and all(map(fold, phrases)):
        concept = Concept(tuple(phrases), "x")
        plain = prompt.replace("{", "").replace("}", "")
        assert ("{}" in template_of(prompt, concept)) == concept.named_in(plain)


@many
@given(st.binary(max_size=300), st.sampled_from(["GIF89a", "\x89PNG\r\n\x1a\n", "BM", "II*\0", "RIFF", ""]))
def test_pictures(tmp_path, content, start):
    (tmp_path / "a.png").write_bytes(start.encode("latin-1") + content)
    try:
        assert read_image(tmp_path / "a.png").dim() == 3
    except ValueError as error:
        assert "a.png" in str(error)
