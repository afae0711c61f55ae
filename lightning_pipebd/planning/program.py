"""The program: one rank's ordered actions for one batch, as data.

The last rank of a pipeline of three blocks, for instance, prints (and parses back) as

    PROGRAM rank=1 rows=64
    RECV boundary=2 rows=0:64 from=0
    TEACH block=2 rows=0:64
    LEARN block=2 rows=0:64
    UPDATE block=2
"""

from __future__ import annotations

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

    Example:
        >>> print(Action(Kind.SEND, 2, Rows(0, 64), peer=1))
        SEND boundary=2 rows=0:64 to=1
        >>> Action.parse("REDUCE block=1 ranks=0,1").ranks
        (0, 1)
    """

    kind: Kind
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which an action has no use for
    rows: Rows = Rows(0, 0)
    peer: int = -1
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.kind.value, *(f"{word}={_write(word, self)}" for word in _WORDS[self.kind])])

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
        try:
            pairs = [part.split("=") for part in parts]
            if tuple(word for word, _ in pairs) != words:
                raise ValueError
            values = {_FIELDS[word]: _read(word, value) for word, value in pairs}
        except ValueError:
            form = " ".join([kind_name, *(f"{word}={_FORMS[word]}" for word in words)])
            raise ValueError(f"`Action` must have the form {form!r}, but is {text!r}. Correct the words.") from None
        return cls(kind, **values)  # type: ignore[arg-type]  # _FIELDS pairs every word with its field's type


class Program(NamedTuple):
    """One rank's ordered actions for one batch of `num_rows` rows.

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

    def __str__(self) -> str:
        return "\n".join([f"PROGRAM rank={self.rank} rows={self.num_rows}", *map(str, self.actions)])

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read back what `str` gave; empty lines are skipped.

        Raises:
            ValueError: The first line is no program header, or another line is no action.
        """
        header, *lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        try:
            name, rank, num_rows = header.split()
            if name != "PROGRAM" or not rank.startswith("rank=") or not num_rows.startswith("rows="):
                raise ValueError
            rank_number, row_number = int(rank.removeprefix("rank=")), int(num_rows.removeprefix("rows="))
        except ValueError:
            raise ValueError(
                f"`Program` must start with 'PROGRAM rank=<rank> rows=<rows>', but starts with {header!r}. "
                "Correct the first line."
            ) from None
        return cls(rank_number, row_number, tuple(map(Action.parse, lines)))

    def last_uses(self) -> dict[int, int]:
        """Give for each boundary the number of the action after which this rank does not need it any more.

        Example:
            >>> Program(0, 4, (Action.parse("LOAD rows=0:4"), Action.parse("TEACH block=0 rows=0:4"))).last_uses()
            {0: 1, 1: 1}
        """
        last: dict[int, int] = {}
        for index, action in enumerate(self.actions):
            if action.kind in (Kind.RECV, Kind.SEND):
                last[action.index] = index
            elif action.kind is Kind.TEACH:
                last[action.index] = last[action.index + 1] = index
            elif action.kind is Kind.LEARN:
                last[action.index] = last[action.index + 1] = last[TARGETS] = index
        return last


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
