"""Files of any bytes: refused by an error that a command shows in a line; no traceback, no hang, no stray file."""

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sa_diffusers.attacks.found import FoundEmbedding, FoundText
from sa_diffusers.cli.verify import verify
from sa_diffusers.core.fisher import Fisher
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.io.artifacts import read_marker
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.training.checkpoints import damaged


REFUSED = (ValueError, RuntimeError, OSError, ArithmeticError)  # what a command shows without its traceback
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=9), parts, max_size=3),
    max_leaves=8,
)
FIELDS = """latents prompts findings vectors losses format fisher exponents key files seconds fingerprint info
forgotten concept method text token_ids""".split()
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)
TENSORS = st.dictionaries(st.sampled_from(FIELDS[:5]), st.lists(st.floats(width=32), max_size=3), max_size=3)
fuzzed = settings(
    max_examples=150,
    deadline=timedelta(seconds=60),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def refuse_or_read(read: Callable[[Path], object], path: Path) -> None:
    """Whatever comes of it, in the folder nothing is changed."""
    before = {other: other.read_bytes() for other in path.parent.iterdir() if other.is_file()}
    try:
        read(path)
    except REFUSED as error:
        assert str(error)
    assert {other: other.read_bytes() for other in path.parent.iterdir() if other.is_file()} == before


TENSOR_FILES = (SampleSet.load, Findings.load, FoundEmbedding.load, Fisher.load)
JSON_FILES = (read_marker, FoundText.load, lambda p: damaged(p.parent), lambda p: read_forgotten(str(p.parent)))


def header_of(header: bytes, length: int | None) -> bytes:
    """A safetensors file of this header, which says that it is so long."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.mark.slow
@fuzzed
@given(
    st.binary(max_size=200)
    | st.builds(header_of, JSON.map(lambda value: json.dumps(value).encode()), st.none() | st.integers(0, 2**64 - 1))
    | st.builds(
        lambda tensors, notes: save({n: torch.tensor(v) for n, v in tensors.items()}, notes),
        TENSORS,
        st.dictionaries(st.sampled_from(FIELDS), JSON.map(json.dumps), max_size=4),
    )
)
@example(save({"a": torch.zeros(1)}, {"format": "sa_diffusers-fisher-2", "fisher": "{}", "exponents": '{"b": 1}'}))
@example(save({"a": torch.zeros(1)}, {"format": "sa_diffusers-fisher-1", "fisher": "{"}))
def test_any_file_of_tensors(tmp_path, data):
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    for load in TENSOR_FILES:
        refuse_or_read(load, path)


@pytest.mark.slow
@fuzzed
@given(st.binary(max_size=60) | (OBJECTS | JSON).map(lambda value: json.dumps(value).encode()))
@example(b'{"forgotten": [{"concept": 1, "method": null}]}')
@example(b'{"forgotten": {"concept": 1}, "key": {}, "files": {"../../x": 1, "\\u0000": 2}}')
def test_any_json(tmp_path, data):
    for name in ("forgotten.json", "hashes.json"):
        (tmp_path / name).write_bytes(data)
        for read in JSON_FILES:
            refuse_or_read(read, tmp_path / name)


@pytest.mark.slow
@settings(fuzzed, max_examples=40)
@given(st.data())
def test_a_run_folder_with_any_file_broken(run_cheaply, tmp_path_factory, data):
    """It is refused or its run goes on, in the folder itself."""
    whole = tmp_path_factory.getbasetemp() / "whole"
    if not whole.exists():
        run_cheaply(whole / "run", checkpointing_steps=2)
    place = tmp_path_factory.mktemp("broken")
    run = Path(shutil.copytree(whole / "run", place / "run"))
    files = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    for name in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
        kept = (run / name).read_bytes()
        at = data.draw(st.integers(0, len(kept)))
        junk = data.draw(st.none() | st.binary(max_size=30) | OBJECTS.map(lambda value: json.dumps(value).encode()))
        if junk is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(kept[:at] + junk + (kept[at + len(junk) :] if data.draw(st.booleans()) else b""))
    for act in (lambda: verify(str(run)), lambda: run_cheaply(run, checkpointing_steps=2)):
        try:
            act()
        except REFUSED as error:
            assert str(run) in str(error)
    assert [path.name for path in place.iterdir()] == ["run"]
    shutil.rmtree(place)
