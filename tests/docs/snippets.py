"""Shell commands and Python blocks of README and docs, taken out of the markdown."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>bash|python)\n(?P<text>.*?)^```", re.M | re.S
)

FENCED = re.compile(r"^```.*?^```", re.M | re.S)
INLINE = re.compile(r"`((?:OMP_NUM_THREADS=1 )?(?:python |accelerate launch |sa-diffusers |scripts/\w+\.py )[^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block; `why` says why it is not run, where its page says so."""

    page: str
    line: int
    language: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each shell command, without assignments to the environment."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [word for line in lines for word in [*shlex.split(line, comments=True), "&&"]]
        found: list[list[str]] = [[]]
        for word in words:
            if word == "&&":
                found.append([])
            elif found[-1] or not re.fullmatch(r"[A-Z_]+=\S*", word):
                found[-1].append(word)
        return [command for command in found if command]


def blocks(language: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("text")) + 1
                yield Block(str(page.relative_to(ROOT)), line, language, match["text"], match["why"])


def inline() -> Iterator[Block]:
    """Commands within sentences, which are read and not run; those with a "..." in the place of a word apart."""
    for page in PAGES:
        sentences = FENCED.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))
        for match in INLINE.finditer(sentences):
            if "..." not in match[1]:
                line = sentences.count("\n", 0, match.start()) + 1
                yield Block(str(page.relative_to(ROOT)), line, "bash", match[1].replace("\n", " "), "in a sentence")
