"""The program of an end-to-end training: one rank's ordered actions for one batch, as data.

A micro-batch is an interval of rows. What belongs to the next batch says so: the teacher works one batch ahead. The
last rank of two that each have a block, for instance, may print (and parse back) as

    PIPELINE rank=1 rows=8 next=8
    RECV hidden=1 rows=0:8 from=0
    FORWARD block=1 rows=0:8
    LOSS rows=0:8
    BACKWARD block=1 rows=0:8
    SEND gradient=1 rows=0:8 to=0
    RECV boundary=1 rows=0:8 from=0 batch=next
    TEACH block=1 rows=0:8 batch=next
    UPDATE block=1
    EMA block=1
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple

from lightning_pipebd.planning.plan import Rows

__all__ = ["WORK", "PipelineAction", "PipelineKind", "PipelineProgram", "Stream"]

_NOTHING = Rows(0, 0)


class PipelineKind(str, Enum):
    """What an action does."""

    LOAD = "LOAD"
    RECV = "RECV"
    SEND = "SEND"
    TEACH = "TEACH"
    FORWARD = "FORWARD"
    LOSS = "LOSS"
    BACKWARD = "BACKWARD"
    BACKWARD_INPUT = "BACKWARD_INPUT"
    BACKWARD_WEIGHT = "BACKWARD_WEIGHT"
    REDUCE = "REDUCE"
    UPDATE = "UPDATE"
    EMA = "EMA"

    def __str__(self) -> str:
        return self.value


WORK = (
    PipelineKind.TEACH,
    PipelineKind.FORWARD,
    PipelineKind.LOSS,
    PipelineKind.BACKWARD,
    PipelineKind.BACKWARD_INPUT,
    PipelineKind.BACKWARD_WEIGHT,
)
"""Actions that compute with blocks: plans are judged by their times."""


class Stream(IntEnum):
    """What travels between ranks, or waits on one."""

    BOUNDARY = 0
    """The teacher's boundary."""
    HIDDEN = 1
    """The student's boundary."""
    GRADIENT = 2
    """The gradient of the student's boundary."""
    TARGETS = 3
    """What the loss needs of the batch."""
    WEIGHTS = 4
    """A student block's weights, for a momentum teacher elsewhere."""
    INPUTS = 5
    """What another replica trains on: both models' inputs, and what the loss needs of the batch."""

    @property
    def word(self) -> str:
        """How programs spell it."""
        return self.name.lower()


class PipelineAction(NamedTuple):
    """One thing one rank does for one batch.

    Args:
        kind: What is done.
        index: Block; boundary of SEND and RECV.
        rows: Rows of the micro-batch, or of all of them.
        stream: What SEND and RECV move.
        peer: Rank that RECV receives from or SEND sends to.
        is_next: Whether the rows are those of the next batch.
        ranks: Ranks that REDUCE together, ascending.

    Example:
        >>> print(PipelineAction(PipelineKind.SEND, 2, Rows(0, 4), Stream.GRADIENT, peer=0))
        SEND gradient=2 rows=0:4 to=0
        >>> PipelineAction.parse("TEACH block=1 rows=0:4 batch=next").is_next
        True
        >>> PipelineAction.parse("REDUCE block=1 ranks=1,3").ranks
        (1, 3)
    """

    kind: PipelineKind
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which an action has no use for
    rows: Rows = _NOTHING
    stream: Stream = Stream.BOUNDARY
    peer: int = -1
    is_next: bool = False
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.kind.value, *(f"{word}={value}" for word, value in self._words())])

    def _words(self) -> list[tuple[str, object]]:
        words: list[tuple[str, object]] = []
        if self.kind in _MOVES:
            words.append((self.stream.word, self.index))
        elif self.kind not in _WITHOUT_BLOCK:
            words.append(("block", self.index))
        if self.kind not in _WITHOUT_ROWS and self.stream is not Stream.WEIGHTS:
            words.append(("rows", self.rows))
        if self.kind in _MOVES:
            words.append((_MOVES[self.kind], self.peer))
        if self.kind is PipelineKind.REDUCE:
            words.append(("ranks", ",".join(map(str, self.ranks))))
        return [*words, ("batch", "next")] if self.is_next else words

    @property
    def follows_update(self) -> bool:
        """Whether this belongs to the optimizer step or comes after it."""
        return self.kind in (PipelineKind.UPDATE, PipelineKind.EMA) or self.stream is Stream.WEIGHTS

    @classmethod
    def parse(cls, text: str) -> PipelineAction:
        """Read back what `str` gave.

        Raises:
            ValueError: The text is not an action.
        """
        name, *parts = text.split() or [""]
        try:
            words = dict(part.split("=") for part in parts)
            kind = PipelineKind(name)
            stream = next((stream for stream in Stream if stream.word in words), Stream.BOUNDARY)
            start, stop = words.get("rows", "0:0").split(":")
            action = cls(
                kind,
                int(words.get(stream.word if kind in _MOVES else "block", 0)),
                Rows(int(start), int(stop)),
                stream,
                int(words.get(_MOVES.get(kind, ""), -1)),
                words.get("batch") == "next",
                tuple(map(int, words["ranks"].split(","))) if "ranks" in words else (),
            )
        except ValueError:
            action = None
        # Only what would be written just so: no word too many, none missing.
        if action is None or str(action) != " ".join(text.split()):
            raise ValueError(
                f"`PipelineAction` must have a form like 'FORWARD block=0 rows=0:8' or 'SEND hidden=1 rows=0:8 to=1', "
                f"but is {text!r}. Correct the words."
            )
        return action


class PipelineProgram(NamedTuple):
    """One rank's ordered actions for one batch.

    Args:
        rank: The rank.
        num_rows: Rows of the batch.
        num_next_rows: Rows of the next batch, whose teacher work this program does; 0 if it does none.
        actions: What to do, in order.

    Example:
        >>> program = PipelineProgram(0, 4, 0, (PipelineAction(PipelineKind.UPDATE, 1),))
        >>> PipelineProgram.parse(str(program)) == program
        True
    """

    rank: int
    num_rows: int
    num_next_rows: int
    actions: tuple[PipelineAction, ...]

    def __str__(self) -> str:
        header = f"PIPELINE rank={self.rank} rows={self.num_rows} next={self.num_next_rows}"
        return "\n".join([header, *map(str, self.actions)])

    @classmethod
    def parse(cls, text: str) -> PipelineProgram:
        """Read back what `str` gave; empty lines are skipped.

        Raises:
            ValueError: The first line is no program header, or another line is no action.
        """
        header, *lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        name, *parts = header.split() or [""]
        words = [part.partition("=") for part in parts]
        is_header = name == "PIPELINE" and [word for word, _, _ in words] == ["rank", "rows", "next"]
        if not is_header or not all(value.isdigit() for _, _, value in words):
            raise ValueError(
                f"`PipelineProgram` must start with 'PIPELINE rank=<rank> rows=<rows> next=<rows>', but starts with "
                f"{header!r}. Correct the first line."
            )
        rank, num_rows, num_next_rows = (int(value) for _, _, value in words)
        return cls(rank, num_rows, num_next_rows, tuple(map(PipelineAction.parse, lines)))


_MOVES = {PipelineKind.SEND: "to", PipelineKind.RECV: "from"}
_WITHOUT_BLOCK = {PipelineKind.LOAD, PipelineKind.LOSS}
_WITHOUT_ROWS = {PipelineKind.REDUCE, PipelineKind.UPDATE, PipelineKind.EMA}
