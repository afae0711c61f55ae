"""All entries, by library and name."""

from __future__ import annotations

from importlib.util import find_spec

from zoo.entries import Entry

__all__ = ["LIBRARIES", "entries_of", "find_entry"]

LIBRARIES = ("torchvision", "timm")


def entries_of(library: str) -> dict[str, Entry]:
    """Give a library's entries; none where it is not installed."""
    if find_spec(library) is None:
        return {}
    if library == "timm":
        from zoo.timm_models import ENTRIES
    else:
        from zoo.torchvision_models import ENTRIES
    return {f"{library}.{name}": entry for name, entry in ENTRIES.items()}


def find_entry(name: str) -> Entry:
    """Give the entry of a name such as ``"torchvision.resnet18"``."""
    return entries_of(name.partition(".")[0])[name]
