"""The explanation of a plan for end-to-end training: who has what, in which order, and how exact it is."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.pipeline_plan import PipelinePlan, Stage
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.plan import PlanError

__all__ = ["check_pipeline_exactness", "describe_exactness", "explain_pipeline", "pipeline_exactness"]


def pipeline_exactness(num_micro_batches: int, coupled_blocks: Sequence[int], *, replicas: int = 1) -> Exactness:
    """Name the class of exactness.

    Args:
        num_micro_batches: Micro-batches of a replica's rows of a batch.
        coupled_blocks: Student blocks that use batch statistics or draw random numbers, or the like.
        replicas: Pipelines side by side.

    Example:
        >>> [str(pipeline_exactness(*case)) for case in ((1, [0]), (4, []), (4, [0]))]
        ['bitwise', 'summation', 'statistics']
        >>> str(pipeline_exactness(1, [], replicas=2))
        'summation'
    """
    if num_micro_batches == replicas == 1:
        return Exactness.BITWISE
    return Exactness.STATISTICS if coupled_blocks else Exactness.SUMMATION


def check_pipeline_exactness(
    num_micro_batches: int, coupled_blocks: Sequence[int], level: Exactness, *, replicas: int = 1
) -> None:
    """Raise if batches are cut more finely than a class of exactness allows.

    Raises:
        PlanError: They are.
    """
    order = list(Exactness)
    found = pipeline_exactness(1, coupled_blocks, replicas=replicas)
    if order.index(found) > order.index(level):
        raise PlanError(
            f"`plan` must keep the student {level}, because `exactness` says so, but {replicas} replicas make it "
            f"{found}. Give a plan of one replica, or leave `exactness` out."
        )
    found = pipeline_exactness(num_micro_batches, coupled_blocks)
    if order.index(found) > order.index(level):
        raise PlanError(
            f"`num_micro_batches` must keep the student {level}, because `exactness` says so, but "
            f"{num_micro_batches} micro-batches make it {found}. Leave one of both out."
        )


def describe_exactness(num_micro_batches: int, coupled_blocks: Sequence[int], *, replicas: int = 1) -> str:
    """Name the class of exactness, and say why it is that.

    Example:
        >>> describe_exactness(1, [0])
        'bitwise (batches are not cut)'
    """
    parts = " and ".join(["replicas"] * (replicas > 1) + ["micro-batches"] * (num_micro_batches > 1))
    reasons = {
        Exactness.BITWISE: "batches are not cut",
        Exactness.SUMMATION: f"{parts} are added up one after another",
        Exactness.STATISTICS: f"student blocks {', '.join(map(str, coupled_blocks))} see {parts}, not batches",
    }
    exactness = pipeline_exactness(num_micro_batches, coupled_blocks, replicas=replicas)
    return f"{exactness} ({reasons[exactness]})"


def explain_pipeline(
    plan: PipelinePlan,
    *,
    num_micro_batches: int,
    schedule: Schedule,
    looks_ahead: bool,
    coupled_blocks: Sequence[int] = (),
    is_full_batch: bool = False,
) -> str:
    """Describe a plan for people.

    Args:
        plan: The plan.
        num_micro_batches: Micro-batches of a batch, or of a replica's rows of it.
        schedule: Order of the work.
        looks_ahead: Whether the teacher works on the next batch in the gaps.
        coupled_blocks: Student blocks whose result depends on how a batch is cut.
        is_full_batch: Whether the loss needs the whole batch.

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
    if plan.replicas > 1:
        each = f"{num_micro_batches} micro-batches each" if num_micro_batches > 1 else "a part of each batch each"
        number = f"{plan.replicas} replicas, {each}"
    ahead = "the next batch while a rank would wait" if looks_ahead else "the batch that is trained on"
    # One rank computes a loss of the full batch for all replicas.
    has_loss = plan.replicas == 1 or not is_full_batch
    return "\n".join(
        [
            f"plan: {plan} ({plan.num_ranks} ranks, {number}, {schedule})",
            *(f"{_name(plan, rank)}: {_duties(plan, rank, has_loss)}" for rank in range(plan.ranks_per_replica)),
            *_sums(plan, has_loss),
            f"teacher: works on {ahead}",
            f"exactness: {describe_exactness(num_micro_batches, coupled_blocks, replicas=plan.replicas)}",
        ]
    )


def _name(plan: PipelinePlan, rank: int) -> str:
    ranks = plan.sharing_ranks(rank)
    return f"rank {rank}" if plan.replicas == 1 else f"ranks {', '.join(map(str, ranks))}"


def _sums(plan: PipelinePlan, has_loss: bool) -> list[str]:
    if plan.replicas == 1:
        return []
    loss = "" if has_loss else f"rank {plan.loss_rank} has the loss of all rows, "
    return [f"replicas: rank {plan.loading_rank} loads for all, {loss}gradients are summed before updates"]


def _duties(plan: PipelinePlan, rank: int, has_loss: bool) -> str:
    duties = [
        f"{side} {_range(stage)}"
        for side, stages in (("teacher", plan.teacher_stages), ("student", plan.student_stages))
        for stage in stages
        if stage.rank == rank
    ]
    duties += ["loads"] * (rank == plan.loading_rank and plan.replicas == 1)
    duties += ["loss"] * (rank == plan.loss_rank and has_loss)
    return ", ".join(duties) or "nothing"


def _range(stage: Stage) -> str:
    return str(stage.first) if stage.first == stage.last else f"{stage.first}-{stage.last}"
