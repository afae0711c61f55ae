"""Pages: titles, tables and pictures as Markdown or as one HTML file that needs no other."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

__all__ = ["Section", "to_html", "to_markdown", "write_page"]

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #d0d7de; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }
svg { max-width: 100%; height: auto; }
"""


class Section(NamedTuple):
    """A part of a page.

    Args:
        title: Heading.
        text: A sentence below it.
        table: Rows, the first with the columns' names.
        picture: File name of an SVG picture.
        verbatim: Lines that are laid out already.
    """

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    picture: str = ""
    verbatim: str = ""


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], pictures: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write a page: Markdown with its pictures beside it, or one HTML file with its pictures in it.

    Args:
        path: File to write; its ending, ``.md`` or ``.html``, chooses.
        title: Of the page.
        sections: Its parts.
        pictures: What draws each picture into a file, under the name that the sections give it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        prefix = f"{path.stem}_"
        for name, draw in pictures.items():
            draw(path.parent / f"{prefix}{name}")
        path.write_text(to_markdown(title, sections, prefix=prefix), encoding="utf-8")
        return
    with TemporaryDirectory() as folder:
        texts = {}
        for name, draw in pictures.items():
            draw(Path(folder, name))
            texts[name] = Path(folder, name).read_text(encoding="utf-8")
    path.write_text(to_html(title, sections, texts), encoding="utf-8")


def to_markdown(title: str, sections: Sequence[Section], *, prefix: str = "") -> str:
    """Write a page as Markdown; pictures are links to files beside it, whose names get a prefix.

    Example:
        >>> print(to_markdown("Run", [Section("Ranks", table=[["rank", "ms"], ["0", "1.5"]])]))
        # Run
        <BLANKLINE>
        ## Ranks
        <BLANKLINE>
        | rank | ms |
        |---|---|
        | 0 | 1.5 |
        <BLANKLINE>
    """
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text)
        if section.table:
            head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in section.table)
            lines = [head, ["---"] * len(head), *rows]
            written = [f"| {' | '.join(line)} |" for line in lines]
            written[1] = f"|{'|'.join(lines[1])}|"
            parts.append("\n".join(written))
        if section.picture:
            parts.append(f"![{section.title}]({prefix}{section.picture})")
        if section.verbatim:
            parts.append(f"```text\n{section.verbatim}\n```")
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: Sequence[Section], pictures: Mapping[str, str]) -> str:
    """Write a page as one HTML file.

    Args:
        title: Of the page.
        sections: Its parts.
        pictures: SVG files' texts under their names.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        if section.table:
            parts.append(_table(section.table))
        if section.picture:
            parts.append(f"<figure>{_inline(section.picture, pictures[section.picture])}</figure>")
        if section.verbatim:
            parts.append(f"<pre>{html.escape(section.verbatim)}</pre>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(table: Sequence[Sequence[str]]) -> str:
    head, *rows = table
    kind = "" if any(head) else ' class="words"'
    lines = [f"<table{kind}>"]
    if any(head):
        lines.append("".join(f"<th>{html.escape(cell)}</th>" for cell in head))
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "\n".join([lines[0], *(f"<tr>{line}</tr>" for line in lines[1:]), "</table>"])


def _inline(name: str, picture: str) -> str:
    """Give the picture's element; its names get the file's, since a page must not have one twice."""
    element = picture[picture.index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name.partition('.')[0]}-", element)
