"""Bytes and milliseconds as people write and read them."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "format_ms", "parse_bytes"]

_UNITS = {"": 1} | {
    unit: base**power
    for power in range(1, 5)
    for unit, base in ((f"{'kmgt'[power - 1]}b", 1000), (f"{'kmgt'[power - 1]}ib", 1024))
}
_UNITS["b"] = 1


def format_bytes(number: float) -> str:
    """Write a number of bytes with the largest unit that keeps it at 1 or more.

    Example:
        >>> format_bytes(2 * 1024**2), format_bytes(100)
        ('2 MiB', '100 B')
    """
    size, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def format_ms(number: float, num_digits: int = 4) -> str:
    """Write milliseconds with so many digits, or as a whole number: never with an exponent.

    Example:
        >>> format_ms(0.12345), format_ms(12345.6), format_ms(181.3, num_digits=2)
        ('0.1235', '12346', '181')
    """
    return f"{number:.0f}" if number >= 10 ** (num_digits - 1) else f"{number:.{num_digits}g}"


def parse_bytes(text: str | int, subject: str) -> int:
    """Read a number of bytes.

    Args:
        text: A number, or a number with a unit: ``"16GiB"``, ``"500 MB"``.
        subject: What is read, for the message.

    Raises:
        ValueError: The text is no such number, or the number is not above 0.

    Example:
        >>> parse_bytes("1.5 KiB", "memory"), parse_bytes(100, "memory")
        (1536, 100)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    try:
        number = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError):
        number = 0
    if number <= 0:
        raise ValueError(f"`{subject}` must be bytes above 0, but is {text!r}. Write for example 16GiB, or 16e9.")
    return number
