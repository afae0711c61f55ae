"""The executor: does what a program says, action by action.

The life of one batch on one rank::

    LOAD/RECV --> boundaries --> TEACH --> boundaries --> SEND
                      |                        |
                      +------> LEARN <---------+      one student block after another: forward, loss, backward;
                                 |                    neighbouring small blocks have one backward pass
                              REDUCE (under way while the next block learns) --> gradients ready for UPDATE

Where teacher blocks work one batch ahead, the boundaries of the next batch are kept from one program to the next.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.relay import Relay, RelayError
from lightning_pipebd.runtime.row_trees import RowTree, find_row_leaves, holds_rows, join_rows, take_rows
from lightning_pipebd.runtime.transport import TransportError

__all__ = ["LEAVE_OUT", "Executor", "Jobs", "Span"]

LEAVE_OUT = "leave `teach_ahead` out, or `ahead` out of the plan"
"""The way out where somebody cannot leave alone what is made of the next batch."""


class Jobs(Protocol):
    """What the blocks compute; the executor knows only when."""

    @property
    def is_full(self) -> bool:
        """Whether :meth:`settle` must come before the next :meth:`learn`."""

    def teach(self, block: int, boundary: Any) -> Any:
        """Give the next boundary."""

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        """Give some rows' part of the batch's mean loss, detached; its gradients may be added later, by :meth:`settle`.

        A block that the program did not bring labels for may get labels or ``None``.
        """

    def settle(self) -> None:
        """Add the gradients of all that was learned."""


class Span(NamedTuple):
    """When an action ran, in seconds of :func:`time.perf_counter`."""

    action: Action
    start_s: float
    stop_s: float


class Executor:
    """Run programs on one rank.

    Args:
        jobs: The blocks of this rank.
        relay: Boundaries from and to other ranks.
        reducer: Gradients of shared blocks.
        cuts_rows: Whether any job's rows are split, so that trees are cut and joined.
        observer: Called with the :class:`Span` of every action; ``None`` measures nothing.
    """

    def __init__(
        self,
        jobs: Jobs,
        relay: Relay,
        reducer: GradientReducer,
        *,
        cuts_rows: bool,
        observer: Callable[[Span], None] | None = None,
    ) -> None:
        self._jobs = jobs
        self._relay = relay
        self._reducer = reducer
        self._cuts_rows = cuts_rows
        self.observer = observer
        self._row_leaves: dict[tuple[int, int], tuple[bool, ...]] = {}
        self._ahead: dict[int, list[RowTree]] = {}
        self._ahead_step = -1
        self._program: Program | None = None
        self._course = _Course({}, frozenset())
        self.current: tuple[Program, int] | None = None  # what a failure report points at
        self.num_done = 0  # what a watcher sees progress by

    def run(
        self,
        program: Program,
        step: int,
        loaded: dict[int, RowTree],
        following: dict[int, RowTree] | None = None,
    ) -> dict[int, Tensor]:
        """Run a program.

        Args:
            program: This rank's program for the batch.
            step: Number of the step; the same on all ranks.
            loaded: Boundary 0 and :data:`~lightning_pipebd.planning.program.TARGETS` on a rank that loads rows.
            following: The same of the next batch, if the teacher blocks are to work on it.

        Returns:
            This rank's part of the loss of each student block that it taught rows of, detached.
        """
        self._relay.begin_step(step)
        self._reducer.begin(program)
        state = _State(step, program, (loaded, following or {}), self._ahead if program.is_taught else {})
        self._ahead = {}
        if program is not self._program:
            self._program, self._course = program, _find_course(program)
        last_uses, may_wait = self._course
        unsettled: list[Span] = []
        for index, action in enumerate(program.actions):
            self.current = (program, index)
            start = time.perf_counter()
            try:
                self._act(action, state)
            except (RelayError, TransportError) as error:
                where = f"rank {program.rank}, step {step}, action {index + 1} of {len(program.actions)} ({action})"
                raise RelayError(f"{where}: {error}") from error
            self.num_done += 1
            unsettled.append(Span(action, start, time.perf_counter()))
            if index not in may_wait or self._jobs.is_full:
                self._settle(unsettled)
                unsettled = []
            for boundary, is_next in last_uses.get(index, ()):
                state.boundaries[is_next].pop(boundary, None)
        self._reducer.finish()
        self.current = None
        kept = program.kept() if program.num_next_rows else ()
        self._ahead = {boundary: pieces for boundary, pieces in state.boundaries[True].items() if boundary in kept}
        self._ahead_step = step
        return state.losses

    def forget(self, program: Program) -> None:
        """Forget the next batch that the last program taught: it will not come, because an epoch has ended early.

        Args:
            program: What this rank would have done for that batch.
        """
        for action in program.actions:
            if action.kind is Kind.RECV and not action.is_next:
                self._receive(action, self._ahead_step, is_ahead=True)
        self._ahead = {}

    def _act(self, action: Action, state: _State) -> None:
        boundaries = state.boundaries[action.is_next]
        if action.kind is Kind.LOAD:
            for boundary, piece in state.loaded[action.is_next].items():
                boundaries[boundary].append(_unchanged(boundary, piece))
        elif action.kind is Kind.RECV:
            is_from_last = state.is_taught and not action.is_next
            step = self._ahead_step if is_from_last else state.step
            boundaries[action.index].append(self._receive(action, step, is_ahead=is_from_last or action.is_next))
        elif action.kind is Kind.SEND:
            piece = take_rows(join_rows(boundaries[action.index], action.rows), action.rows)
            self._relay.send(state.step, _wire_number(action.index, is_ahead=action.is_next), piece, action.peer)
        elif action.kind is Kind.TEACH:
            piece = self._teach(action, boundaries[action.index])
            if state.has_next:
                piece.note_versions()
            boundaries[action.index + 1].append(piece)
        elif action.kind is Kind.LEARN:
            self._learn(action, state)
        elif action.kind is Kind.REDUCE:
            self._reducer.start(action.index, action.ranks)

    def _settle(self, spans: list[Span]) -> None:
        """Do what was put off, and tell of these actions."""
        if spans[-1].action.kind is Kind.LEARN:
            self._jobs.settle()
        if self.observer is not None:
            for span in _share_time(spans, time.perf_counter()):
                self.observer(span)

    def _receive(self, action: Action, step: int, *, is_ahead: bool) -> RowTree:
        number, name = _wire_number(action.index, is_ahead=is_ahead), _name(action.index, is_ahead=is_ahead)
        return self._relay.recv(step, number, action.rows, action.peer, name)

    def _teach(self, action: Action, pieces: list[RowTree]) -> RowTree:
        boundary = join_rows(pieces, action.rows)
        output = self._jobs.teach(action.index, boundary.tree)
        piece = RowTree(action.rows, output)
        if self._cuts_rows:
            piece.row_leaves = self._find_row_leaves(action, boundary, output)
        return piece

    def _find_row_leaves(self, action: Action, boundary: RowTree, output: Any) -> tuple[bool, ...]:
        # Teaching a second number of rows is the only way to know which leaves follow the rows; once per block and
        # structure, and the frozen teacher does not notice.
        num_leaves = len(pytree.tree_leaves(output))
        key = (action.index, num_leaves)
        if key not in self._row_leaves:
            num_rows = action.rows.num_rows
            start = action.rows.start
            if num_rows > 1:
                probe, num_probe_rows = take_rows(boundary, Rows(start, start + 1)), 1
            else:
                twice = RowTree(Rows(start + 1, start + 2), boundary.tree, boundary.row_leaves)
                probe, num_probe_rows = join_rows([boundary, twice], Rows(start, start + 2)), 2
            self._row_leaves[key] = find_row_leaves(
                output,
                num_rows,
                self._jobs.teach(action.index, probe.tree),
                num_probe_rows,
                subject=f"teacher block {action.index}",
            )
        return self._row_leaves[key]

    def _learn(self, action: Action, state: _State) -> None:
        block, rows = action.index, action.rows
        boundary = _unchanged(block, join_rows(state.boundaries[False][block], rows)).tree
        target = _unchanged(block + 1, join_rows(state.boundaries[False][block + 1], rows)).tree
        labels = state.find_labels(rows)
        state.losses[block] = self._jobs.learn(block, boundary, target, labels, rows, state.num_rows)


class _State:
    """What one rank holds of one batch, and of the next one."""

    def __init__(
        self,
        step: int,
        program: Program,
        loaded: tuple[dict[int, RowTree], dict[int, RowTree]],
        taught: dict[int, list[RowTree]],
    ) -> None:
        self.step = step
        self.num_rows = program.num_rows
        self.is_taught = program.is_taught
        self.has_next = program.num_next_rows > 0
        self.loaded = loaded
        own: defaultdict[int, list[RowTree]] = defaultdict(list, taught)
        following: defaultdict[int, list[RowTree]] = defaultdict(list)
        self.boundaries = (own, following)
        self.losses: dict[int, Tensor] = {}

    def find_labels(self, rows: Rows) -> Any:
        # Labels travel to the blocks that want them. Another block of this rank may find those of some of its rows.
        pieces = self.boundaries[False].get(TARGETS)
        return _unchanged(TARGETS, join_rows(pieces, rows)).tree if pieces and holds_rows(pieces, rows) else None


def _unchanged(boundary: int, piece: RowTree) -> RowTree:
    """Give what may have been made a step early, if it still is as it was made."""
    if not piece.is_as_noted:
        what = "The labels of a batch" if boundary == TARGETS else f"Boundary {boundary}"
        raise RuntimeError(
            f"{what} must stay as it was made until student blocks have learned from it, because the teacher works one "
            "batch ahead, but was changed in place since then: by a teacher block or a loader that uses the same "
            "memory for each batch, by a hook or by a callback. Let them give new tensors each time, and leave batches "
            f"alone, or {LEAVE_OUT}."
        )
    return piece


def _share_time(spans: list[Span], stop_s: float) -> list[Span]:
    """Divide the time until a common end in proportion to the forward passes: what was learned had one backward pass.

    Actions in between last as long as they did, and begin later.
    """
    is_learned = [span.action.kind is Kind.LEARN for span in spans]
    own_s = [span.stop_s - span.start_s for span in spans]
    learned_s = sum(s for s, learns in zip(own_s, is_learned, strict=True) if learns)
    other_s = sum(own_s) - learned_s
    begin_s = spans[0].start_s
    factor = (stop_s - begin_s - other_s) / learned_s if learned_s else 1.0
    times = [s * factor if learns else s for s, learns in zip(own_s, is_learned, strict=True)]
    stops = [begin_s + s for s in accumulate(times)]
    return [Span(span.action, end_s - s, end_s) for span, s, end_s in zip(spans, times, stops, strict=True)]


class _Course(NamedTuple):
    """What is the same each time a program runs, by the numbers of its actions.

    Args:
        last_uses: Boundaries that are not needed any more after an action, so that their memory can go.
        may_wait: Actions after which the backward pass of what was learned may wait for that of the next block; nothing
            but teaching comes in between.
    """

    last_uses: dict[int, list[tuple[int, bool]]]
    may_wait: frozenset[int]


@lru_cache(maxsize=128)
def _find_course(program: Program) -> _Course:
    ends: defaultdict[int, list[tuple[int, bool]]] = defaultdict(list)
    for is_next, last_uses in ((False, program.last_uses()), (True, program.last_uses_of_next())):
        for boundary, index in last_uses.items():
            ends[index].append((boundary, is_next))
    return _Course(dict(ends), frozenset(_find_waiting(program)))


def _find_waiting(program: Program) -> Iterator[int]:
    learns = [index for index, action in enumerate(program.actions) if action.kind is Kind.LEARN]
    for index, following in pairwise(learns):
        if all(action.kind is Kind.TEACH for action in program.actions[index + 1 : following]):
            yield from range(index, following)


def _wire_number(boundary: int, *, is_ahead: bool) -> int:
    """Number what a message is about: in one step two batches may have the same boundary on its way."""
    return TARGETS - 2 - boundary if is_ahead else boundary


def _name(boundary: int, *, is_ahead: bool) -> str:
    """Say what a message is about, for people."""
    what = "the labels" if boundary == TARGETS else f"boundary {boundary}"
    return f"{what} of the next batch" if is_ahead else what
