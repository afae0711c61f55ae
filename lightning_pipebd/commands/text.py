"""Tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_columns"]


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in columns as wide as their widest cell; numbers to the right, words to the left.

    Example:
        >>> print(format_columns([["block", "ms"], ["stem", "1.5"], ["head", "12.0"]]))
        block    ms
        stem    1.5
        head   12.0
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_number = [all(cell[:1].isdigit() or cell[:1] in ("-", "") for cell in column[1:]) for column in columns]
    lines = []
    for row in rows:
        cells = zip(row, widths, is_number, strict=True)
        lines.append("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells))
    return "\n".join(line.rstrip() for line in lines)
