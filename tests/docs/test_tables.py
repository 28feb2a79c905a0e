"""The tables of the pages are those of the files that commands wrote."""

import subprocess
import sys

import pytest

from scripts.tables import PAGES, ROOT, TABLES, renewed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_results(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert renewed(text) == text, "run `make tables`"


def test_every_table_stands_somewhere_and_every_file_is_in_the_list() -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in TABLES if f"<!-- table: {name} -->" not in everything] == []
    listed = (ROOT / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    files = [f"docs/results/{path.name}" for path in (ROOT / "docs" / "results").glob("*.json")]
    assert files and [name for name in files if f"`{name}`" not in listed] == []


def test_a_changed_number_is_found_and_written_back() -> None:
    text = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    assert "28%" in text and renewed(text.replace("28%", "29%")) == text
    with pytest.raises(ValueError, match="got 'none_such'"):
        renewed("<!-- table: none_such -->\n<!-- /table -->\n")


@pytest.mark.slow
def test_counted_costs_are_what_the_command_counts_today(tmp_path) -> None:
    command = [sys.executable, "scripts/benchmark.py", "--size", "sd14", "--estimate", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    committed = ROOT / "docs" / "results" / "cost_sd14.json"
    assert (tmp_path / "benchmark.json").read_text() == committed.read_text()
