"""The program: one rank's ordered actions for one batch, as data.

The last rank of a pipeline of three blocks, for instance, prints (and parses back) as

    PROGRAM rank=1 rows=64
    RECV boundary=2 rows=0:64 from=0
    TEACH block=2 rows=0:64
    LEARN block=2 rows=0:64
    UPDATE block=2

Where teacher blocks work one batch ahead, their actions end with the word `next`, and the first line tells how many
rows the next batch has, and whether the batch itself is `taught` already.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from lightning_pipebd.planning.plan import Rows

__all__ = ["TARGETS", "Action", "Kind", "Program"]

TARGETS = -1
"""Pseudo boundary: the labels of the batch, present where its rows are loaded."""


class Kind(str, Enum):
    """What an action does."""

    LOAD = "LOAD"
    RECV = "RECV"
    TEACH = "TEACH"
    SEND = "SEND"
    LEARN = "LEARN"
    REDUCE = "REDUCE"
    UPDATE = "UPDATE"

    def __str__(self) -> str:
        return self.value


class Action(NamedTuple):
    """One thing one rank does for one batch.

    Args:
        kind: What is done.
        index: Block of TEACH, LEARN, REDUCE and UPDATE; boundary of RECV and SEND (`TARGETS` for the labels).
        rows: Rows that are loaded, moved, taught or learned.
        peer: Rank that RECV receives from or SEND sends to.
        ranks: Ranks that REDUCE together, ascending.
        is_next: Whether it is done for the next batch, a step before that is trained on.

    Example:
        >>> print(Action(Kind.SEND, 2, Rows(0, 64), peer=1))
        SEND boundary=2 rows=0:64 to=1
        >>> print(Action(Kind.TEACH, 2, Rows(0, 64), is_next=True))
        TEACH block=2 rows=0:64 next
        >>> Action.parse("REDUCE block=1 ranks=0,1").ranks
        (0, 1)
    """

    kind: Kind
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which an action has no use for
    rows: Rows = Rows(0, 0)
    peer: int = -1
    ranks: tuple[int, ...] = ()
    is_next: bool = False

    def __str__(self) -> str:
        words = (f"{word}={_write(word, self)}" for word in _WORDS[self.kind])
        return " ".join([self.kind.value, *words, *([_NEXT] if self.is_next else [])])

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read back what `str` gave.

        Raises:
            ValueError: The text is not an action; the message shows the form that is.
        """
        kind_name, *parts = text.split() or [""]
        if kind_name not in Kind.__members__:
            raise ValueError(
                f"`Action` must start with one of {', '.join(Kind.__members__)}, but starts with {kind_name!r} "
                f"(in {text!r}). Correct the first word."
            )
        kind = Kind(kind_name)
        words = _WORDS[kind]
        is_next = parts[-1:] == [_NEXT] and kind in _AHEAD
        try:
            pairs = [part.split("=") for part in (parts[:-1] if is_next else parts)]
            if tuple(word for word, _ in pairs) != words:
                raise ValueError
            values = {_FIELDS[word]: _read(word, value) for word, value in pairs}
        except ValueError:
            form = " ".join([kind_name, *(f"{word}={_FORMS[word]}" for word in words)])
            raise ValueError(f"`Action` must have the form {form!r}, but is {text!r}. Correct the words.") from None
        return cls(kind, **values, is_next=is_next)  # type: ignore[arg-type]  # _FIELDS knows every word's field


class Program(NamedTuple):
    """One rank's ordered actions for one batch of `num_rows` rows.

    Args:
        rank: The rank.
        num_rows: Rows of the batch.
        actions: What it does, in order.
        num_next_rows: Rows of the next batch, where the teacher blocks work on it already; 0 if they do not.
        is_taught: Whether the teacher blocks have worked on the batch itself already, a step ago.

    Example:
        >>> program = Program(rank=0, num_rows=4, actions=(Action(Kind.LOAD, rows=Rows(0, 4)),))
        >>> print(program)
        PROGRAM rank=0 rows=4
        LOAD rows=0:4
        >>> Program.parse(str(program)) == program
        True
    """

    rank: int
    num_rows: int
    actions: tuple[Action, ...]
    num_next_rows: int = 0
    is_taught: bool = False

    def __str__(self) -> str:
        header = f"PROGRAM rank={self.rank} rows={self.num_rows}"
        header += (f" next={self.num_next_rows}" if self.num_next_rows else "") + (" taught" if self.is_taught else "")
        return "\n".join([header, *map(str, self.actions)])

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read back what `str` gave; empty lines are skipped.

        Raises:
            ValueError: The first line is no program header, or another line is no action.
        """
        header, *lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        found = _HEADER.fullmatch(header)
        if found is None:
            raise ValueError(
                f"`Program` must start with 'PROGRAM rank=<rank> rows=<rows>', but starts with {header!r}. "
                "Correct the first line."
            )
        rank, num_rows, num_next_rows = (int(number or 0) for number in found.groups()[:3])
        return cls(rank, num_rows, tuple(map(Action.parse, lines)), num_next_rows, found[4] is not None)

    def last_uses(self) -> dict[int, int]:
        """Give for each boundary of the batch the number of the action after which this rank does not need it any more.

        Example:
            >>> Program(0, 4, (Action.parse("LOAD rows=0:4"), Action.parse("TEACH block=0 rows=0:4"))).last_uses()
            {0: 1, 1: 1}
        """
        return self._last_uses(is_next=False)

    def last_uses_of_next(self) -> dict[int, int]:
        """Give the same for boundaries of the next batch, without those that its students will need on this rank."""
        kept = self.kept()
        return {boundary: index for boundary, index in self._last_uses(is_next=True).items() if boundary not in kept}

    def kept(self) -> set[int]:
        """Give the boundaries that this rank's student blocks need of every batch.

        Example:
            >>> sorted(Program(0, 4, (Action.parse("LEARN block=2 rows=0:4"),)).kept())
            [-1, 2, 3]
        """
        learned = [action.index for action in self.actions if action.kind is Kind.LEARN]
        return {boundary for block in learned for boundary in (block, block + 1, TARGETS)}

    def _last_uses(self, *, is_next: bool) -> dict[int, int]:
        last: dict[int, int] = {}
        for index, action in enumerate(self.actions):
            if action.is_next is not is_next:
                continue
            if action.kind in (Kind.RECV, Kind.SEND):
                last[action.index] = index
            elif action.kind is Kind.TEACH:
                last[action.index] = last[action.index + 1] = index
            elif action.kind is Kind.LEARN:
                last[action.index] = last[action.index + 1] = last[TARGETS] = index
        return last


_HEADER = re.compile(r"PROGRAM\s+rank=(-?\d+)\s+rows=(\d+)(?:\s+next=(\d+))?(\s+taught)?")
_NEXT = "next"
_AHEAD = (Kind.LOAD, Kind.RECV, Kind.TEACH, Kind.SEND)

_WORDS: dict[Kind, tuple[str, ...]] = {
    Kind.LOAD: ("rows",),
    Kind.RECV: ("boundary", "rows", "from"),
    Kind.TEACH: ("block", "rows"),
    Kind.SEND: ("boundary", "rows", "to"),
    Kind.LEARN: ("block", "rows"),
    Kind.REDUCE: ("block", "ranks"),
    Kind.UPDATE: ("block",),
}
_FIELDS = {"block": "index", "boundary": "index", "rows": "rows", "from": "peer", "to": "peer", "ranks": "ranks"}
_FORMS = {
    "block": "<block>",
    "boundary": "<boundary>",
    "rows": "<start>:<stop>",
    "from": "<rank>",
    "to": "<rank>",
    "ranks": "<rank>,<rank>",
}


def _write(word: str, action: Action) -> str:
    if word == "boundary" and action.index == TARGETS:
        return "targets"
    if word == "ranks":
        return ",".join(map(str, action.ranks))
    return str(getattr(action, _FIELDS[word]))


def _read(word: str, value: str) -> int | Rows | tuple[int, ...]:
    if word == "boundary" and value == "targets":
        return TARGETS
    if word == "rows":
        start, stop = value.split(":")
        return Rows(int(start), int(stop))
    if word == "ranks":
        return tuple(map(int, value.split(",")))
    return int(value)
