"""The executor of end-to-end training: does what a program says, action by action.

The life of one micro-batch in one stage of the student::

    RECV hidden --> FORWARD --> SEND hidden          a graph per block waits for its gradient
    RECV gradient --> BACKWARD --> SEND gradient     graphs end; gradients of the weights add up

Blocks are graphs of their own: what enters one is a leaf, whose gradient is what the block before it gets. On the last
rank LOSS makes the first of these gradients, from the outputs of both models. Replicas sum the gradients of weights; a
loss of the full batch is computed on one rank, which gets the outputs of all replicas and sends the gradients back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.pipeline_state import BlockGraph, StepState, begin_graph, gradient_of
from lightning_pipebd.runtime.relay import Relay, RelayError
from lightning_pipebd.runtime.row_trees import (
    RowTree,
    join_rows,
    leading_row_leaves,
    tree_bytes,
    tree_leaves,
)
from lightning_pipebd.runtime.transport import TransportError

__all__ = ["PipelineExecutor", "PipelineJobs", "PipelineSpan"]


class PipelineJobs(Protocol):
    """What the blocks compute; the executor knows only when."""

    def teach(self, block: int, boundary: Any) -> Any:
        """Give the teacher's next boundary, without gradient."""

    def forward(self, block: int, boundary: Any, rows: Rows) -> Any:
        """Give the student's next boundary; the graph begins at the leaves of ``boundary``."""

    def loss(
        self, student_output: Any, teacher_output: Any, targets: Any, rows: Rows, num_rows: int
    ) -> dict[str, Tensor]:
        """Put the gradients of the loss into the leaves of ``student_output``; give its terms' parts, detached."""

    def parameters(self, block: int) -> Sequence[nn.Parameter]:
        """Give what a student block trains."""

    def weights(self, block: int) -> Sequence[Tensor]:
        """Give what a momentum teacher wants to know of a student block."""

    def promote(self, block: int) -> None:
        """Let a delayed momentum teacher's block move on to the next batch."""

    def follow(self, block: int) -> None:
        """Let a momentum teacher's block follow the student's."""

    def stay(self, block: int) -> None:
        """End a step that was skipped for a momentum teacher's block."""


class PipelineSpan(NamedTuple):
    """When an action ran, in seconds of :func:`time.perf_counter`; that of a RECV is waiting. SEND knows its bytes."""

    action: PipelineAction
    start_s: float
    stop_s: float
    num_bytes: int = 0


class PipelineExecutor:
    """Run programs on one rank.

    Args:
        jobs: The blocks of this rank.
        relay: Brings messages from and to other ranks.
        num_teacher_blocks: Blocks of the whole teacher.
        num_student_blocks: Blocks of the whole student.
        reducer: Sums gradients over replicas; ``None`` where there is one replica.
        observer: Called with the :class:`PipelineSpan` of every action; ``None`` measures nothing.
    """

    def __init__(
        self,
        jobs: PipelineJobs,
        relay: Relay,
        *,
        num_teacher_blocks: int,
        num_student_blocks: int,
        reducer: GradientReducer | None = None,
        observer: Callable[[PipelineSpan], None] | None = None,
    ) -> None:
        self._jobs = jobs
        self._relay = relay
        self._outputs = (Stream.BOUNDARY, num_teacher_blocks), (Stream.HIDDEN, num_student_blocks)
        self._reducer = reducer
        self.observer = observer
        self._ahead: list[RowTree] = []
        self._sent_ahead: dict[Stream, RowTree] = {}
        self.current: tuple[PipelineProgram, int] | None = None  # what a failure report points at
        self.num_done = 0
        self._due: tuple[PipelineProgram, int, StepState] | None = None

    def run(
        self,
        program: PipelineProgram,
        step: int,
        loaded: dict[Stream, RowTree],
        ahead: dict[Stream, RowTree] | None = None,
    ) -> dict[str, Tensor]:
        """Run a program up to its UPDATE; :meth:`finish` runs what follows the optimizer step.

        Args:
            program: This rank's program for the batch.
            step: Number of the step; the same on all ranks.
            loaded: On the rank that loads: both models' inputs, and what the loss needs of the batch.
            ahead: On the rank that loads: the same of the next batch, if the teacher is to work on it.

        Returns:
            The terms of the loss, on the rank that computes it.
        """
        self._relay.begin_step(step)
        state = StepState(step, program, {**self._sent_ahead, **loaded}, ahead or {})
        # What the teacher made of this batch a step ahead; of another batch it would have to be forgotten.
        state.pieces[(*self._outputs[0], False)] = self._ahead
        self.forget()
        place = 0
        while place < len(program.actions) and not program.actions[place].follows_update:
            self._act(program, place, state)
            place += 1
        if self._reducer is not None and place < len(program.actions):
            self._finish_sums(self._reducer, program, place, step)
        self._ahead = state.pieces.pop((*self._outputs[0], True), [])
        self._sent_ahead = state.received_ahead
        self._due = (program, place, state)
        assert not state.graphs, "a forward has no backward"
        return state.terms

    def finish(self, *, is_skipped: bool = False) -> None:
        """Run what follows the optimizer step: the momentum teacher follows, unless all ranks skipped the step."""
        assert self._due is not None
        program, place, state = self._due
        self._due = None
        for index in range(place, len(program.actions)):
            action = program.actions[index]
            if not is_skipped:
                self._act(program, index, state)
            elif action.kind is PipelineKind.EMA:
                self._jobs.stay(action.index)

    def forget(self) -> None:
        """Forget what there is of a batch that will not come: an epoch has ended early."""
        self._ahead, self._sent_ahead = [], {}

    def _finish_sums(self, reducer: GradientReducer, program: PipelineProgram, place: int, step: int) -> None:
        self.current = (program, place)  # the updates come next
        try:
            reducer.finish()
        except TransportError as error:
            raise RelayError(f"rank {program.rank}, step {step}, before {program.actions[place]}: {error}") from error
        self.current = None

    def _act(self, program: PipelineProgram, place: int, state: StepState) -> None:
        action = program.actions[place]
        self.current = (program, place)
        start = time.perf_counter()
        try:
            sent = self._do(action, state)
        except (RelayError, TransportError) as error:
            where = f"rank {program.rank}, step {state.step}, action {place + 1} of {len(program.actions)} ({action})"
            raise RelayError(f"{where}: {error}") from error
        self.current = None
        self.num_done += 1
        if self.observer is not None:
            stop = time.perf_counter()
            self.observer(PipelineSpan(action, start, stop, 0 if sent is None else tree_bytes(sent.tree)))

    def _do(self, action: PipelineAction, state: StepState) -> RowTree | None:
        """Do an action; give what it sent."""
        kind = action.kind
        if kind is PipelineKind.RECV:
            self._recv(action, state)
        elif kind is PipelineKind.SEND:
            return self._send(action, state)
        elif kind is PipelineKind.TEACH:
            self._teach(action, state)
        elif kind is PipelineKind.FORWARD:
            self._forward(action, state)
        elif kind is PipelineKind.LOSS:
            self._loss(action, state)
        elif kind is PipelineKind.BACKWARD_WEIGHT:
            graph = state.graphs.pop((action.index, action.rows))
            graph.backward_to([p for p in self._jobs.parameters(action.index) if p.requires_grad])
        elif kind in (PipelineKind.BACKWARD, PipelineKind.BACKWARD_INPUT):
            self._backward(action, state)
        elif kind is PipelineKind.REDUCE:
            assert self._reducer is not None
            self._reducer.begin(state.program)
            self._reducer.start(action.index, action.ranks)
        elif kind is PipelineKind.EMA:
            self._jobs.follow(action.index)
        return None

    def _send(self, action: PipelineAction, state: StepState) -> RowTree:
        if action.stream is Stream.WEIGHTS:
            # Copies: the next optimizer step must not change what is still on its way.
            piece = RowTree(action.rows, [tensor.detach().clone() for tensor in self._jobs.weights(action.index)])
        elif action.stream is Stream.GRADIENT:
            piece = RowTree(action.rows, state.gradients.pop((action.index, action.rows)))
        elif action.stream is Stream.INPUTS:
            piece = RowTree(action.rows, state.cut_inputs(action))
        else:
            found = state.take(action)
            wants_gradient = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(found.tree)]
            piece = RowTree(action.rows, (found.tree, wants_gradient))
        self._relay.send(state.step, _wire_number(action), piece, action.peer)
        return piece

    def _recv(self, action: PipelineAction, state: StepState) -> None:
        tree = self._relay.recv(state.step, _wire_number(action), action.rows, action.peer, _name(action)).tree
        if action.stream is Stream.WEIGHTS:
            with torch.no_grad():
                for own, new in zip(self._jobs.weights(action.index), tree, strict=True):
                    own.copy_(new)
        elif action.stream is Stream.GRADIENT:
            state.gradients[action.index, action.rows] = tree
        elif action.stream is Stream.INPUTS:
            state.load(action, tree)
        else:
            content, wants_gradient = tree
            for leaf, wanted in zip(tree_leaves(content), wants_gradient, strict=True):
                if wanted:
                    leaf.requires_grad_()
            state.put(action.stream, action.index, RowTree(action.rows, content), action.is_next)

    def _teach(self, action: PipelineAction, state: StepState) -> None:
        if action.is_next and state.has_update:
            self._jobs.promote(action.index)
        boundary = state.take(action._replace(stream=Stream.BOUNDARY))
        output = self._jobs.teach(action.index, boundary.tree)
        state.put(Stream.BOUNDARY, action.index + 1, RowTree(action.rows, output), action.is_next)

    def _forward(self, action: PipelineAction, state: StepState) -> None:
        boundary, leaves = begin_graph(state.take(action._replace(stream=Stream.HIDDEN)).tree)
        output = self._jobs.forward(action.index, boundary, action.rows)
        state.graphs[action.index, action.rows] = BlockGraph(leaves, tree_leaves(output))
        state.put(Stream.HIDDEN, action.index + 1, RowTree(action.rows, output))

    def _loss(self, action: PipelineAction, state: StepState) -> None:
        (_, num_teacher_blocks), (_, num_student_blocks) = self._outputs
        pieces, beginnings = [], []
        for piece in state.take_all(Stream.HIDDEN, num_student_blocks, action.rows):
            tree, leaves = begin_graph(piece.tree)
            pieces.append(RowTree(piece.rows, tree))
            beginnings.append((piece.rows, leaves))
        student_output = _join(pieces, action.rows, "the student's output")
        taught = state.take_all(Stream.BOUNDARY, num_teacher_blocks, action.rows)
        teacher_output = _join(taught, action.rows, "the teacher's output")
        targets = state.take_all(Stream.TARGETS, 0, action.rows)
        labels = _join(targets, action.rows, "targets") if targets else None
        terms = self._jobs.loss(student_output, teacher_output, labels, action.rows, state.program.num_rows)
        for name, value in terms.items():
            state.terms[name] = state.terms[name] + value if name in state.terms else value
        for rows, leaves in beginnings:
            state.gradients[num_student_blocks, rows] = [gradient_of(leaf) for leaf in leaves]

    def _backward(self, action: PipelineAction, state: StepState) -> None:
        key = (action.index, action.rows)
        graph = state.graphs[key]
        graph.take(state.gradients.pop((action.index + 1, action.rows)))
        if action.kind is PipelineKind.BACKWARD_INPUT:
            inputs = [leaf for leaf in graph.leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            graph.backward_to(inputs, keep=True)
        else:
            graph.backward()
            del state.graphs[key]
        if action.index:
            state.gradients[key] = [gradient_of(leaf) for leaf in graph.leaves]


def _join(pieces: Sequence[RowTree], rows: Rows, subject: str) -> Any:
    """Join parts of a batch: tensors whose first dimension is the rows are joined, others must be alike in all parts.

    Raises:
        ValueError: They are not.
    """
    if len(pieces) <= 1:
        return join_rows(pieces, rows).tree
    leaves = [tree_leaves(piece.tree) for piece in pieces]
    flags = [leading_row_leaves(piece.tree, piece.rows.num_rows) for piece in pieces]
    row_leaves = tuple(map(all, zip(*flags, strict=True)))
    for place, is_rows in enumerate(row_leaves):
        if not is_rows and not all(_are_alike(leaves[0][place], own[place]) for own in leaves[1:]):
            msg = (
                f"`{subject}` must have the rows of the batch in the first dimension of every tensor, or the same for "
                f"all rows, because `loss` needs them together, but tensor {place} is neither for rows "
                f"{', '.join(str(piece.rows) for piece in pieces)}. Put the rows first, or leave batches whole: one "
                "replica, `num_micro_batches=1`."
            )
            raise ValueError(msg)
    return join_rows([RowTree(piece.rows, piece.tree, row_leaves) for piece in pieces], rows).tree


def _are_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return not isinstance(one, (int, float)) or one == other


def _wire_number(action: PipelineAction) -> int:
    """Number what a message is about; the relay knows boundaries by number."""
    return (action.index * len(Stream) + action.stream) * 2 + action.is_next


_NAMES = {
    Stream.BOUNDARY: "boundary {} of the teacher",
    Stream.HIDDEN: "boundary {} of the student",
    Stream.GRADIENT: "the gradient of the student's boundary {}",
    Stream.TARGETS: "what the loss needs",
    Stream.WEIGHTS: "the weights of student block {}",
    Stream.INPUTS: "the inputs of both models",
}


def _name(action: PipelineAction) -> str:
    """Say what a message is about, for people."""
    return _NAMES[action.stream].format(action.index) + (" of the next batch" if action.is_next else "")
