"""In which order each rank teaches, goes forward and goes backward, micro-batch by micro-batch.

Every order is found by letting all ranks work off several batches on a clock. What a rank does in the steady state is
its order. So stages may have any lengths, and since the order was found by doing the work, it can be done: no rank
waits for a task that waits for it. Whoever is free takes the most urgent task that is ready, and no such rule is the
best for all stages: several manners are tried, and the ranks keep to the orders that make a step short.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from lightning_pipebd.planning.pipeline_clock import Manner, Orders, PipelineClock
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Durations, Phase, Schedule, StepKind

__all__ = ["schedule_tasks"]

_NUM_STEADY_STEPS = 6
_NUM_TIMED_STEPS = 8

# While a rank teaches it answers late, and with nothing to spare its neighbours would wait for it; a rank that waits
# for them instead of teaching keeps fewer micro-batches. The first is best or nearly so for most stages.
_MANNERS = (Manner(2, 0.0), Manner(1, 0.0), Manner(0, 0.5), Manner(2, 0.5), Manner(4, 0.0), Manner(4, 0.5))
# So near to the shortest step, fewer micro-batches under way are worth more than time; and there is no need to go on.
_NEAR = 1.005


def schedule_tasks(
    plan: PipelinePlan,
    durations: Durations,
    *,
    num_units: int,
    num_next_units: int,
    step: StepKind,
    schedule: Schedule,
    is_full_batch: bool,
    splits_backward: bool,
) -> Orders:
    """Give every rank the order of its tasks in a step.

    Args:
        plan: Who has which block.
        durations: What tasks take.
        num_units: Micro-batches of the batch.
        num_next_units: Micro-batches of the next batch, if its teacher work belongs to the step.
        step: Which teacher work belongs to the step.
        schedule: The rule.
        is_full_batch: Whether the loss needs the whole batch, so that no backward begins before the last forward.
        splits_backward: Whether the gradients of the weights are tasks of their own, which may wait.
    """
    clock = PipelineClock(plan, durations, schedule, is_full_batch, splits_backward)
    steady = StepKind(teaches_own=step.teaches_own and not step.teaches_next, teaches_next=step.teaches_next)
    if step.teaches_own == step.teaches_next:
        steady = StepKind(teaches_own=False, teaches_next=True)
    if steady.teaches_own:
        kinds, wanted = [step] * _NUM_STEADY_STEPS, _NUM_STEADY_STEPS - 2
    elif step.teaches_own:
        kinds, wanted = [step, steady, steady], 0
    elif step.teaches_next:
        kinds = _from_the_beginning(step, _NUM_STEADY_STEPS)
        wanted = _NUM_STEADY_STEPS - 1
    else:
        kinds, wanted = [*_from_the_beginning(steady, 2), step], 3
    units = [num_units] * len(kinds)
    if wanted + 1 < len(kinds):
        # Later steps only stand for what follows; the step itself teaches this many of the next batch's micro-batches.
        units[wanted + 1 :] = [num_next_units or num_units] * (len(kinds) - wanted - 1)
    return clock.run(kinds, units, _best_manner(clock, steady, num_units)).orders[wanted]


def _from_the_beginning(steady: StepKind, num_steps: int) -> list[StepKind]:
    """Give these steps behind the very first, in which the teacher works on two batches."""
    return [StepKind(teaches_own=True, teaches_next=True), *[steady] * num_steps]


@lru_cache(maxsize=256)
def _best_manner(clock: PipelineClock, steady: StepKind, num_units: int) -> Manner:
    """Choose how all steps of a training are ordered, by the step in the steady state."""
    manners = _manners(clock, num_units)
    if len(manners) == 1:
        return manners[0]
    bound_ms = clock.bound_ms(num_units)
    kinds = [steady] * _NUM_TIMED_STEPS if steady.teaches_own else _from_the_beginning(steady, _NUM_TIMED_STEPS - 1)
    units = [num_units] * len(kinds)
    found: list[tuple[float, int, Manner]] = []
    for manner in manners:
        orders = clock.run(kinds, units, manner).orders[_NUM_STEADY_STEPS - 1]
        # Timed again: ranks keep to one order, also where another step was worked off in another.
        ends_ms = clock.run(kinds, units, manner, keep=orders).ends_ms
        middle = len(kinds) // 2
        found.append(((ends_ms[-1] - ends_ms[middle]) / (len(kinds) - 1 - middle), _most_under_way(orders), manner))
        if found[-1][0] <= _NEAR * bound_ms:
            break
    shortest_ms = min(found)[0]
    return min((own for own in found if own[0] <= _NEAR * shortest_ms), key=lambda own: own[1])[2]


def _manners(clock: PipelineClock, num_units: int) -> tuple[Manner, ...]:
    if clock.schedule is Schedule.TEACHER_FIRST:
        return (Manner(0, 0.0),)
    if clock.all_forward_first:
        return (Manner(0, 0.0), Manner(0, 0.5))
    num_stages = len(clock.plan.student_stages)
    if num_stages == 1:
        # There is nobody to wait for.
        return _MANNERS[:1]
    fitting = [manner for manner in (*_MANNERS, Manner(num_stages, 0.0)) if manner.num_spare <= num_stages]
    # More to spare than there are other micro-batches makes no difference.
    return tuple(dict.fromkeys(Manner(min(spare, num_units - 1), patience) for spare, patience in fitting))


def _most_under_way(orders: Orders) -> int:
    """Give the most micro-batches that a rank keeps for their backward at once."""
    splits_backward = any(task.phase is Phase.WEIGHT for order in orders for task in order)
    last = Phase.WEIGHT if splits_backward else Phase.BACKWARD
    changes = ([(task.phase is Phase.FORWARD) - (task.phase is last) for task in order] for order in orders)
    return max(max(accumulate(own), default=0) for own in changes)
