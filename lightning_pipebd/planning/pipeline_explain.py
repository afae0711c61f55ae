"""The explanation of a plan for end-to-end training: who has what, in which order, and how exact it is."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.pipeline_plan import PipelinePlan, Stage
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.plan import PlanError

__all__ = ["check_pipeline_exactness", "describe_exactness", "explain_pipeline", "pipeline_exactness"]


def pipeline_exactness(num_micro_batches: int, coupled_blocks: Sequence[int]) -> Exactness:
    """Name the class of exactness.

    Args:
        num_micro_batches: Micro-batches of a batch.
        coupled_blocks: Student blocks that use batch statistics or draw random numbers, or the like.

    Example:
        >>> [str(pipeline_exactness(*case)) for case in ((1, [0]), (4, []), (4, [0]))]
        ['bitwise', 'summation', 'statistics']
    """
    if num_micro_batches == 1:
        return Exactness.BITWISE
    return Exactness.STATISTICS if coupled_blocks else Exactness.SUMMATION


def check_pipeline_exactness(num_micro_batches: int, coupled_blocks: Sequence[int], level: Exactness) -> None:
    """Raise if batches are cut more finely than a class of exactness allows.

    Raises:
        PlanError: They are.
    """
    found, order = pipeline_exactness(num_micro_batches, coupled_blocks), list(Exactness)
    if order.index(found) > order.index(level):
        raise PlanError(
            f"`num_micro_batches` must keep the student {level}, because `exactness` says so, but "
            f"{num_micro_batches} micro-batches make it {found}. Leave one of both out."
        )


def describe_exactness(num_micro_batches: int, coupled_blocks: Sequence[int]) -> str:
    """Name the class of exactness, and say why it is that.

    Example:
        >>> describe_exactness(1, [0])
        'bitwise (batches are not cut)'
    """
    reasons = {
        Exactness.BITWISE: "batches are not cut",
        Exactness.SUMMATION: "micro-batches are added up one after another",
        Exactness.STATISTICS: f"student blocks {', '.join(map(str, coupled_blocks))} see micro-batches, not batches",
    }
    exactness = pipeline_exactness(num_micro_batches, coupled_blocks)
    return f"{exactness} ({reasons[exactness]})"


def explain_pipeline(
    plan: PipelinePlan,
    *,
    num_micro_batches: int,
    schedule: Schedule,
    looks_ahead: bool,
    coupled_blocks: Sequence[int] = (),
) -> str:
    """Describe a plan for people.

    Args:
        plan: The plan.
        num_micro_batches: Micro-batches of a batch.
        schedule: Order of the work.
        looks_ahead: Whether the teacher works on the next batch in the gaps.
        coupled_blocks: Student blocks whose result depends on how a batch is cut.

    Example:
        >>> plan = PipelinePlan.parse("0|1")
        >>> print(explain_pipeline(plan, num_micro_batches=8, schedule=Schedule.GPIPE, looks_ahead=True))
        plan: 0|1 (2 ranks, 8 micro-batches, gpipe)
        rank 0: teacher 0, student 0, loads
        rank 1: teacher 1, student 1, loss
        teacher: works on the next batch while a rank would wait
        exactness: summation (micro-batches are added up one after another)
    """
    number = f"{num_micro_batches} micro-batches" if num_micro_batches > 1 else "whole batches"
    ahead = "the next batch while a rank would wait" if looks_ahead else "the batch that is trained on"
    return "\n".join(
        [
            f"plan: {plan} ({plan.num_ranks} ranks, {number}, {schedule})",
            *(f"rank {rank}: {_duties(plan, rank)}" for rank in range(plan.num_ranks)),
            f"teacher: works on {ahead}",
            f"exactness: {describe_exactness(num_micro_batches, coupled_blocks)}",
        ]
    )


def _duties(plan: PipelinePlan, rank: int) -> str:
    duties = [
        f"{side} {_range(stage)}"
        for side, stages in (("teacher", plan.teacher_stages), ("student", plan.student_stages))
        for stage in stages
        if stage.rank == rank
    ]
    duties += ["loads"] * (rank == plan.loading_rank) + ["loss"] * (rank == plan.loss_rank)
    return ", ".join(duties) or "nothing"


def _range(stage: Stage) -> str:
    return str(stage.first) if stage.first == stage.last else f"{stage.first}-{stage.last}"
