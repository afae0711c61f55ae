"""One loss for all replicas: of the full batch, computed once, where the outputs of all rows come together.

From programs in which every replica has a loss of its own::

    replica 0: FORWARD, LOSS rows=0:2, BACKWARD         replica 1: FORWARD, LOSS rows=2:4, BACKWARD

to programs in which the loss rank of the first one has them all::

    replica 0: FORWARD, RECV hidden, LOSS rows=0:4, SEND gradient, BACKWARD
    replica 1: FORWARD, SEND hidden, RECV gradient, BACKWARD

Outputs, the teacher's too, are sent the moment they exist. So what `loss` draws at random, keeps in buffers or logs is
that of one process, and the gradient of every row is that of the one loss: sums over replicas count nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, Stream
from lightning_pipebd.planning.plan import Rows

__all__ = ["join_losses"]

_BACKWARD = (PipelineKind.BACKWARD, PipelineKind.BACKWARD_INPUT)


def join_losses(
    plan: PipelinePlan, programs: Sequence[Sequence[PipelineAction]], num_rows: int
) -> list[list[PipelineAction]]:
    """Have the first replica's loss rank compute the loss of all rows.

    Args:
        plan: Has replicas.
        programs: For every rank its actions up to the last, each replica with a loss of its own.
        num_rows: Rows of the batch.

    Returns:
        The same with one loss. A replica without rows takes no part in it.
    """
    own = plan.ranks_per_replica
    whole = Rows(0, num_rows)
    first = [
        [action._replace(rows=whole) if action.stream is Stream.TARGETS else action for action in actions]
        for actions in programs[:own]
    ]
    others = [list(_without_loss(plan, rank, programs[rank])) for rank in range(own, plan.num_ranks)]
    arriving = [
        action._replace(kind=PipelineKind.RECV, peer=rank)
        for rank, actions in enumerate(others, own)
        for action in actions
        if action.kind is PipelineKind.SEND and action.peer == plan.loss_rank
    ]
    first[plan.loss_rank] = list(_with_all_outputs(first[plan.loss_rank], arriving, whole))
    return [*first, *others]


def _without_loss(plan: PipelinePlan, rank: int, actions: Sequence[PipelineAction]) -> Iterator[PipelineAction]:
    """Send the outputs of a replica's rank to the loss, and wait there for the gradients."""
    taught, studied, loss_rank = len(plan.teacher), len(plan.student), plan.loss_rank
    has_loss = plan.place(rank)[1] == loss_rank
    for action in actions:
        kind, index = action.kind, action.index
        if kind is PipelineKind.LOSS or action.stream is Stream.TARGETS:
            continue
        if kind is PipelineKind.RECV and (action.stream, index) == (Stream.BOUNDARY, taught):
            continue
        if kind is PipelineKind.SEND and (action.stream, index) == (Stream.BOUNDARY, taught):
            yield action._replace(peer=loss_rank)
            continue
        if kind in _BACKWARD and index == studied - 1:
            yield PipelineAction(PipelineKind.RECV, studied, action.rows, Stream.GRADIENT, loss_rank)
        yield action
        if kind is PipelineKind.FORWARD and index == studied - 1:
            yield PipelineAction(PipelineKind.SEND, studied, action.rows, Stream.HIDDEN, loss_rank)
        if kind is PipelineKind.TEACH and index == taught - 1 and has_loss:
            yield PipelineAction(PipelineKind.SEND, taught, action.rows, Stream.BOUNDARY, loss_rank, action.is_next)


def _with_all_outputs(
    actions: Sequence[PipelineAction], arriving: Sequence[PipelineAction], whole: Rows
) -> Iterator[PipelineAction]:
    """Wait for all outputs before the loss, and send the gradients after it; the next batch's teacher's come last."""
    needed = [action for action in arriving if not action.is_next]
    ahead = [action for action in arriving if action.is_next]
    for action in actions:
        if action.follows_update:
            yield from ahead
            ahead = []
        if action.kind is not PipelineKind.LOSS:
            yield action
            continue
        yield from needed
        yield action._replace(rows=whole)
        for output in needed:
            if output.stream is Stream.HIDDEN:
                yield PipelineAction(PipelineKind.SEND, output.index, output.rows, Stream.GRADIENT, output.peer)
    yield from ahead
