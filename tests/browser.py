"""Pages in headless Chromium: each at the width of a desk and of a phone, light and dark, and printed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOST_SHEETS = 40  # more, and something is laid out as on no paper
# Every page stands in frames of one document, which looks into them: a window is never as narrow as a phone.
LOOK = """
function overflowing(page) {
  const scrolls = element =>
    element && (getComputedStyle(element).overflowX !== "visible" || scrolls(element.parentElement));
  return [...page.body.querySelectorAll("*")].filter(element => !scrolls(element.parentElement)).filter(element =>
    element.getBoundingClientRect().right > page.documentElement.clientWidth + 1
    || (element.scrollWidth > element.clientWidth + 1 && element.clientWidth && !scrolls(element)));
}
addEventListener("load", () => {
  const said = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, say = what => said.push(`${frame.title}: ${what}`);
    for (const part of page.querySelectorAll("details")) part.open = true;
    const named = element => `<${element.tagName.toLowerCase()}> ${element.textContent.trim().slice(0, 60)}`;
    overflowing(page).forEach(element => say(`overflows: ${named(element)}`));
    for (const picture of page.images) {
      if (!picture.complete || !picture.naturalWidth) say(`not loaded: ${picture.alt}`);
      if (!picture.alt.trim()) say(`without a text: ${picture.outerHTML.slice(0, 60)}`);
    }
    const dark = getComputedStyle(page.body).backgroundColor.match(/\\d+/g)[0] < 128;
    if (dark !== (frame.style.colorScheme === "dark")) say("not in its colours");
    if (frame.clientWidth !== page.documentElement.clientWidth) say("not of its width");
    if (!page.body.textContent.trim()) say("empty");
  }
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify(said);
  document.body.replaceChildren(found);
});
"""


def assert_whole(pages: list[Path], folder: Path, subtests: pytest.Subtests) -> None:
    """Nothing is wrong with these pages under the folder; skipped, as a part of a test, where Chromium is absent."""
    with subtests.test("pages"):
        if CHROMIUM is None:
            pytest.skip("no Chromium here to look at the pages (Debian: apt-get install chromium)")
        assert look_at(pages, folder) == []
        sheets = {str(page.relative_to(folder)): printed(page, folder) for page in pages}
        assert {page: count for page, count in sheets.items() if not 1 <= count <= MOST_SHEETS} == {}


def look_at(pages: list[Path], folder: Path) -> list[str]:
    """What is wrong with them: elements that overflow, pictures that are not loaded or have no text."""
    frames = [
        f'<iframe title="{page.relative_to(folder)} {width} {scheme}" srcdoc="{html.escape(page.read_text())}" '
        f'style="border: 0; color-scheme: {scheme}" width="{width}" height="900"></iframe>'
        for page in pages for width in (1200, 400) for scheme in ("light", "dark")
    ]  # fmt: skip
    look = folder / "look.html"
    look.write_text(f"<!doctype html><meta charset=utf-8><script>{LOOK}</script><body>{''.join(frames)}</body>")
    shown = _chromium(folder, "--hide-scrollbars", "--dump-dom", look.as_uri())
    found = re.search(r'<pre id="found">(.*)</pre>', shown.stdout, re.S)
    assert found is not None, shown.stderr
    return json.loads(html.unescape(found[1]))


def printed(page: Path, folder: Path) -> int:
    """On how many sheets of paper it is printed."""
    file = folder / "printed.pdf"
    file.unlink(missing_ok=True)
    said = _chromium(folder, "--no-pdf-header-footer", f"--print-to-pdf={file}", page.as_uri())
    assert file.is_file(), said.stderr
    data = file.read_bytes()
    assert data.startswith(b"%PDF") and data.rstrip().endswith(b"%%EOF")
    counts = re.findall(rb"/Type /Pages\s[^>]*/Count (\d+)", data)  # of the whole tree, and of its branches
    return max(map(int, counts), default=0)


def _chromium(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/chromium", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)
