"""Frozen dataclasses as strings, numbers, lists and dictionaries, and back: what YAML and JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lightning_pipebd.planning.curve import CostError, Curve

__all__ = ["PlainData"]

_Class = TypeVar("_Class")
_Self = TypeVar("_Self", bound="PlainData")


class PlainData:
    """A frozen dataclass that YAML and JSON files hold; a subclass says under which name messages speak of it.

    Fields are numbers, truth values, strings, curves, frozen dataclasses, or tuples of these.
    """

    __slots__ = ()
    _subject = ""

    @classmethod
    def from_dict(cls: type[_Self], data: Mapping[str, Any]) -> _Self:
        """Read back what `to_dict` gave, or what a person wrote into a YAML or JSON file.

        Raises:
            CostError: A key is missing or unknown or a value is impossible; the message names the place.
        """
        return _from_plain(cls, data, cls._subject)

    def to_dict(self) -> dict[str, Any]:
        """Describe it in strings, numbers, lists and dictionaries, fit for YAML and JSON."""
        plain: dict[str, Any] = _to_plain(self)
        return plain


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_to_plain(entry) for entry in value]
    return value


def _from_plain(cls: type[_Class], data: Any, where: str) -> _Class:
    """Read a dataclass; fields with a default may be missing. `where` says in messages what is read."""
    if not isinstance(data, Mapping):
        raise CostError(f"`{where}` must be a mapping, but is {data!r}. Write its keys and values.")
    assert is_dataclass(cls)
    hints = get_type_hints(cls)
    required = {field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING}
    if unknown := sorted(str(key) for key in data if key not in hints):
        raise CostError(
            f"`{where}` must have keys among {', '.join(sorted(hints))}, but has {', '.join(unknown)}. "
            "Correct the spelling or leave it out."
        )
    if missing := sorted(required - set(data)):
        raise CostError(f"`{where}` must have the keys {', '.join(sorted(required))}, but lacks {', '.join(missing)}.")
    values = {str(key): _read(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    return cls(**values)


def _read(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        return _from_plain(kind, value, where)
    if kind is Curve:
        return _read_curve(value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise CostError(f"`{where}` must be a list, but is {value!r}. Write a list.")
        entry_kind = get_args(kind)[0]
        return tuple(_read(entry_kind, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    # A limit that does not exist is written as null.
    kinds = get_args(kind) or (kind,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise CostError(f"`{where}` must be {names}, but is {value!r} ({type(value).__name__}). Correct the value.")
    return value


def _read_curve(value: Any, where: str) -> Curve:
    if not isinstance(value, (list, tuple)) or not all(isinstance(point, (list, tuple)) for point in value):
        raise CostError(
            f"`{where}` must be a list of pairs, but is {value!r}. Write for example [[32, 1.5], [64, 2.8]]."
        )
    try:
        return Curve(value)
    except CostError as error:
        raise CostError(f"`{where}` cannot be read: {error}") from None
