"""The documentation keeps its word: its Python runs, prints what the page says, and its links lead somewhere.

A page marks what this test shall know, invisibly for readers::

    <!-- no-run: starts four processes -->     before a block of Python that only has to be Python
    <!-- python                                a block that draws the figure below it
    -->

A block of text right below a block of Python is what the Python prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightning_pipebd

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_EXAMPLE = re.compile(
    r"(?:^<!-- no-run: (?P<reason>[^\n]+) -->\n)?"
    r"^(?:```python\n(?P<shown>.*?)^```|<!-- python\n(?P<hidden>.*?)^-->)\n"
    r"(?:\n*^```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A block of Python on a page, and what the page says that it prints."""

    page: str
    line: int
    code: str
    output: str | None
    is_run: bool

    def run(self) -> None:
        # Behind empty lines, so that a traceback names the line of the page.
        exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), {"__name__": "__main__"})


def find_examples(page: str, text: str) -> Iterator[Example]:
    for match in _EXAMPLE.finditer(text):
        name = "shown" if match["hidden"] is None else "hidden"
        line = text.count("\n", 0, match.start(name)) + 1
        yield Example(page, line, match[name], match["output"], is_run=match["reason"] is None)


def find_broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for match in _LINK.finditer(_FENCED.sub("", text)):
        address, _, anchor = match["target"].partition("#")
        if "://" in address:
            continue
        target = page.parent / address if address else page
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
            broken.append(match["target"])
    return broken


def _anchors(text: str) -> set[str]:
    """Give the names under which GitHub links to a page's headings."""
    titles = (match["title"].lower() for match in _HEADING.finditer(_FENCED.sub("", text)))
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}


EXAMPLES = [
    pytest.param(example, id=f"{path.relative_to(ROOT)}:{example.line}")
    for path in PAGES
    for example in find_examples(str(path), path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_and_prints_what_its_page_says(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not example.is_run:
        compile(example.code, example.page, "exec")
        return
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    example.run()
    assert example.output in (None, capsys.readouterr().out)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(path: Path) -> None:
    assert find_broken_links(path, path.read_text(encoding="utf-8")) == []


def test_every_public_name_is_on_a_page() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [name for name in lightning_pipebd.__all__ if not re.search(rf"\b{name}\b", text)] == []


PAGE = """\
# A page: with marks

```python
print("a")
```

```text
a
```

Prose ends the pair.

<!-- python
print("b")
-->
```text
c
```

<!-- no-run: needs a GPU -->
```python
print("d")
```
"""


def test_a_page_is_read_as_its_marks_say() -> None:
    shown, hidden, unrun = find_examples("page.md", PAGE)
    assert shown == Example("page.md", 4, 'print("a")\n', "a\n", is_run=True)
    assert hidden == Example("page.md", 14, 'print("b")\n', "c\n", is_run=True)
    assert unrun == Example("page.md", 22, 'print("d")\n', None, is_run=False)


def test_an_error_in_an_example_names_the_line_of_the_page() -> None:
    example = Example("page.md", 7, "x = 1\nraise KeyError(x)\n", None, is_run=True)
    with pytest.raises(KeyError) as caught:
        example.run()
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 8)


def test_a_link_to_nothing_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    links = "[a](page.md) [b](#a-page-with-marks) [c](page.md#nothing) [d](nothing.md) [e](https://example.org)"
    assert find_broken_links(page, links) == ["page.md#nothing", "nothing.md"]
