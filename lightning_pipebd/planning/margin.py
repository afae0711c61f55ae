"""The margin: by how much one plan must be predicted to be faster than another before that can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

from lightning_pipebd.planning.families import Found
from lightning_pipebd.planning.judge import Judge
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Kind

__all__ = ["margin_ms"]


def margin_ms(simple: Found, other: Found, judge: Judge) -> float:
    """Give the ms that two plans' predicted step times may differ by although the other one is not faster.

    Two parts are added. The noise of the measured times: the other plan is faster only if each of its ranks is done
    earlier than the simple plan's busiest one; times that both have in common cancel each other, and those that are
    left err independently. And the error of the model, of which nothing cancels.

    Args:
        simple: The plan to leave.
        other: The plan to take instead.
        judge: Has the costs.
    """
    costs = judge.costs
    return costs.model_error * simple.candidate.step_time_ms + (_noise_ms(simple, other, judge) if costs.noise else 0.0)


_Times = dict[tuple[Kind, int, int], float]


def _noise_ms(simple: Found, other: Found, judge: Judge) -> float:
    if simple.judgement is None or other.judgement is None:
        # Too large to simulate: nothing is known of the ranks.
        return judge.costs.noise * simple.candidate.step_time_ms
    busiest_ms = max(simple.judgement.busy_ms)
    busiest = _rank_times(simple.candidate.plan, judge)[simple.judgement.busy_ms.index(busiest_ms)]
    longest_ms, noise_ms = max(other.judgement.busy_ms), 0.0
    for busy_ms, times in zip(other.judgement.busy_ms, _rank_times(other.candidate.plan, judge), strict=True):
        slack_ms = longest_ms - busy_ms
        if judge.costs.noise * (busiest_ms + busy_ms) > slack_ms:
            differences = _differences(busiest, times)
            noise_ms = max(noise_ms, judge.costs.noise * hypot(*differences) - slack_ms)
    return noise_ms


def _differences(first: _Times, second: _Times) -> list[float]:
    return [first.get(key, 0.0) - second.get(key, 0.0) for key in first.keys() | second.keys()]


def _rank_times(plan: Plan, judge: Judge) -> Sequence[_Times]:
    """Give for every rank the measured times that its step is made of."""
    found: list[_Times] = [{} for _ in range(plan.num_ranks)]
    of_ranks = [judge.costs.times(name) for name in judge.cluster.device_class]
    for block in range(plan.num_blocks):
        for rank, rows in plan.teacher_rows(block, judge.num_rows).items():
            found[rank][Kind.TEACH, block, rows.num_rows] = of_ranks[rank][block].teach_ms.at(rows.num_rows)
        for rank, rows in plan.student_rows(block, judge.num_rows).items():
            found[rank][Kind.LEARN, block, rows.num_rows] = of_ranks[rank][block].learn_ms.at(rows.num_rows)
            found[rank][Kind.UPDATE, block, 0] = of_ranks[rank][block].update_ms
    return found
