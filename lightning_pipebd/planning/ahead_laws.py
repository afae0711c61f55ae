"""The laws of programs whose teacher blocks work one batch ahead, checked over several steps.

What the steps do for one batch, put together, must be lawful as the programs of a batch are; and all ranks must be able
to work off all steps, one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_pipebd.planning.clock import clock_ticks
from lightning_pipebd.planning.laws import LawError, check_laws
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Program

__all__ = ["batch_programs", "check_ahead_laws"]


def check_ahead_laws(plan: Plan, steps: Sequence[Sequence[Program]], *, target_blocks: Collection[int] = ()) -> None:
    """Refuse programs of consecutive steps that would hang, compute something twice, or use what is not there.

    Args:
        plan: The plan the programs shall carry out.
        steps: For every step one program per rank; the first step's batch was not taught before, and the last step
            teaches no batch.
        target_blocks: Student blocks whose loss reads the labels.

    Raises:
        LawError: The first broken law: those of :func:`~lightning_pipebd.planning.laws.check_laws` for every batch,
            "steps fit together", and "no cycle of waits" over all steps.
    """
    for index, programs in enumerate(steps):
        before = steps[index - 1][0].num_next_rows if index else 0
        for rank, program in enumerate(programs):
            expected = before if program.is_taught else 0
            if program.is_taught != bool(before) or (expected and expected != program.num_rows):
                found = f"it is for {program.num_rows} rows, and the step before has taught {before}"
                raise LawError("steps fit together", rank, None, None, found)
    if steps and any(program.num_next_rows for program in steps[-1]):
        raise LawError("steps fit together", 0, None, None, "the last step teaches a batch that does not come")
    for index in range(len(steps)):
        check_laws(plan, batch_programs(steps, index), target_blocks=target_blocks)
    _check_waits(steps)


def batch_programs(steps: Sequence[Sequence[Program]], index: int) -> tuple[Program, ...]:
    """Put together what the steps do for one batch, in the order in which every rank does it."""
    own = steps[index]
    earlier = steps[index - 1] if index else ()
    return tuple(
        Program(
            program.rank,
            program.num_rows,
            tuple(
                action._replace(is_next=False)
                for actions, is_next in ((earlier[rank].actions if earlier else (), True), (program.actions, False))
                for action in actions
                if action.is_next is is_next
            ),
        )
        for rank, program in enumerate(own)
    )


def _check_waits(steps: Sequence[Sequence[Program]]) -> None:
    # Equal actions for different batches must not be taken for each other: rows tell the batches apart.
    first_rows, shift = [], 0
    for programs in steps:
        first_rows.append(shift)
        shift += programs[0].num_rows
    first_rows.append(shift)
    whole = [
        Program(
            rank,
            shift,
            tuple(
                action._replace(
                    rows=action.rows._replace(
                        start=action.rows.start + first_rows[index + action.is_next],
                        stop=action.rows.stop + first_rows[index + action.is_next],
                    ),
                    is_next=False,
                )
                for index, programs in enumerate(steps)
                for action in programs[rank].actions
            ),
        )
        for rank in range(len(steps[0]) if steps else 0)
    ]
    for program, ticks in zip(whole, clock_ticks(whole), strict=True):
        if len(ticks) < len(program.actions):
            position = len(ticks)
            raise LawError("no cycle of waits", program.rank, position, program.actions[position], "it waits for ever")
