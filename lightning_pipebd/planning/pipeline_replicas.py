"""Pipelines side by side: every replica's programs for its rows of a batch, and what joins them.

One rank loads for all replicas, so that whatever is drawn at random while loading is what one process draws; it sends
each replica its rows, a step ahead where the teacher works ahead. Before a block is updated, its gradients are summed
over the ranks that have it. All ranks begin these sums in one order, last block first, each as soon as its gradients
are there.

A loss of the full batch is computed on one rank for all replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_pipebd.planning.pipeline_joined_loss import join_losses
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.plan import Rows

if TYPE_CHECKING:
    from lightning_pipebd.planning.pipeline_compiler import PipelineStep

__all__ = ["write_replicas"]


def write_replicas(
    plan: PipelinePlan, step: PipelineStep, compile_one: Callable[[PipelineStep], Sequence[PipelineProgram]]
) -> tuple[PipelineProgram, ...]:
    """Give every rank its program, from those of one replica.

    Args:
        plan: Has replicas.
        step: What to do with the whole batch.
        compile_one: Compiles a step of one replica by itself.
    """
    written = [own for number in range(plan.replicas) for own in _Replica(plan, step, number).write(compile_one)]
    if step.is_full_batch:
        written = join_losses(plan, written, step.num_rows)
    programs = []
    for rank, actions in enumerate(written):
        place = plan.place(rank)[1]
        blocks = [block for block, owner in enumerate(plan.student) if owner == place]
        if step.update and blocks:
            actions = _with_sums(actions, blocks, plan.sharing_ranks(place))
        programs.append(PipelineProgram(rank, step.num_rows, step.num_next_rows, tuple(actions)))
    return tuple(programs)


class _Replica:
    """Writes the programs of one replica's ranks."""

    def __init__(self, plan: PipelinePlan, step: PipelineStep, number: int) -> None:
        self.plan = plan
        self.step = step
        self.number = number
        self.first_rank = number * plan.ranks_per_replica
        self.own, self.following = plan.rows(number, step.num_rows), plan.rows(number, step.num_next_rows)

    def write(self, compile_one: Callable[[PipelineStep], Sequence[PipelineProgram]]) -> Iterator[list[PipelineAction]]:
        """Give every rank's actions, but for the sums."""
        # A short batch may leave a replica without rows: of a step with a row, what is not about that row remains.
        num_rows = max(self.own.num_rows, 1)
        programs = compile_one(replace(self.step, num_rows=num_rows, num_next_rows=self.following.num_rows))
        for program in programs:
            actions = [moved for action in program.actions for moved in self._moved(action)]
            yield _with_late_inputs(actions) if self.number else actions

    def _moved(self, action: PipelineAction) -> Iterator[PipelineAction]:
        """Give an action of the replica by itself its place among all ranks and rows."""
        if action.follows_update:
            yield action if action.peer < 0 else action._replace(peer=self.first_rank + action.peer)
            return
        rows = self.following if action.is_next else self.own
        if rows.is_empty:
            return
        if action.kind is PipelineKind.LOAD:
            yield from self._load(action, rows)
            return
        moved = action._replace(rows=Rows(rows.start + action.rows.start, rows.start + action.rows.stop))
        yield moved if action.peer < 0 else moved._replace(peer=self.first_rank + action.peer)

    def _load(self, action: PipelineAction, rows: Rows) -> Iterator[PipelineAction]:
        plan = self.plan
        # What the teacher saw a step ahead was sent then, with what the student sees.
        was_sent = not action.is_next and not self.step.teaches_own
        if self.number and not was_sent:
            yield PipelineAction(PipelineKind.RECV, 0, rows, Stream.INPUTS, plan.loading_rank, action.is_next)
        if self.number:
            return
        num_rows = self.step.num_next_rows if action.is_next else self.step.num_rows
        yield action._replace(rows=Rows(0, num_rows))
        for replica, peer in enumerate(plan.sharing_ranks(plan.loading_rank)):
            theirs = plan.rows(replica, num_rows)
            if replica and not theirs.is_empty and not was_sent:
                yield PipelineAction(PipelineKind.SEND, 0, theirs, Stream.INPUTS, peer, action.is_next)


def _with_late_inputs(actions: Sequence[PipelineAction]) -> list[PipelineAction]:
    """Let what was sent for the next batch arrive while the rank works on this one."""
    late = next((action for action in actions if action.stream is Stream.INPUTS and action.is_next), None)
    if late is None:
        return list(actions)
    others = [action for action in actions if action != late]
    uses = (number for number, action in enumerate(others) if action.is_next)
    return [*others[: (place := next(uses))], late, *others[place:]]


def _with_sums(
    actions: Sequence[PipelineAction], blocks: Sequence[int], ranks: tuple[int, ...]
) -> list[PipelineAction]:
    """Add the sums of blocks, last block first, each after all backwards of it and of those before it."""
    first_update = next(place for place, action in enumerate(actions) if action.kind is PipelineKind.UPDATE)
    sums: dict[int, list[PipelineAction]] = {}
    place = 0
    for block in reversed(blocks):
        backward = [
            number + 1
            for number, action in enumerate(actions)
            if action.index == block and action.kind in (PipelineKind.BACKWARD, PipelineKind.BACKWARD_WEIGHT)
        ]
        place = max(place, *backward) if backward else first_update
        # Another rank may wait for what was made; to begin a sum takes time.
        while actions[place].kind is PipelineKind.SEND:
            place += 1
        sums.setdefault(place, []).append(PipelineAction(PipelineKind.REDUCE, block, ranks=ranks))
    return [found for number, action in enumerate(actions) for found in (*sums.get(number, ()), action)]
