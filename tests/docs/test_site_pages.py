"""What the generated pages of methods tell the reader to run is taken."""

import runpy
from pathlib import Path

import pytest
from snippets import BLOCK, ROOT, Block

from sa_diffusers import methods
from sa_diffusers.__main__ import main


PAGES = runpy.run_path(str(ROOT / "docs" / "site_pages.py"))["pages"]()


def test_methods_of_words_and_of_pictures_name_their_own_families() -> None:
    words, pictures = PAGES["methods/sa.md"][1], PAGES["methods/encoder.md"][1]
    assert "families/stable_diffusion.md" in words and "families/masked_autoencoder.md" not in words
    assert "families/stable_diffusion.md" not in pictures and "families/masked_autoencoder.md" in pictures


class PlannedError(Exception):
    """Every check has passed, and the first stage would start."""


@pytest.mark.slow  # each loads a bundled pipeline
@pytest.mark.parametrize("name", methods.registry())
def test_the_command_of_a_methods_page_reaches_its_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(context, stages) -> None:
        assert context.method.name == name
        raise PlannedError

    monkeypatch.setattr("sa_diffusers.runs.forget.announce", planned)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red three\na green four\na blue nine\n")
    page = f"methods/{name}.md"
    (match,) = BLOCK.finditer(PAGES[page][1])
    (words,) = Block(page, 1, "bash", match["text"], None).commands
    if not methods.get(name).completes:  # in the place of the hub's model, one that knows fewer words
        words += ["--model", "bundled/digits/pipeline", "--replay_prompts", "prompts.txt"]
    with pytest.raises(PlannedError):
        main(words[1:])
