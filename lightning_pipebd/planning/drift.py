"""Drift: training takes other times than those that were measured before, and perhaps another plan would do better.

The times are others because something else uses the devices, or because a block is trained no longer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lightning_pipebd.planning.costs import BlockTimes, CostTable, DeviceTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import PlanError
from lightning_pipebd.planning.program import Kind

__all__ = ["ObservedTimes", "adjust_costs", "find_better", "freeze_costs"]

#: Per rank, action (TEACH or LEARN), block and rows: the time that it took, in ms.
ObservedTimes = Mapping[tuple[int, Kind, int, int], float]

_WORTH = 0.05
_MOST_NOISE = 0.1
# A backward pass takes about twice as long as the forward pass.
_FORWARD = 1 / 3


def adjust_costs(outlook: Outlook, observed: ObservedTimes) -> CostTable:
    """Give the costs with every observed block's times scaled to what was observed.

    A curve keeps its shape: one number of rows was observed, and all others scale with it. Of several ranks of one
    class that share a job, the mean counts.

    Args:
        outlook: What was foreseen.
        observed: What was seen instead.
    """
    costs = outlook.measurement.costs
    factors: dict[tuple[str, Kind, int], list[float]] = {}
    for (rank, kind, block, rows), ms in observed.items():
        device_class = outlook.cluster.device_class[rank]
        foreseen = _curve(costs.times(device_class)[block], kind).at(rows)
        if foreseen > 0:
            factors.setdefault((device_class, kind, block), []).append(ms / foreseen)

    def scaled(device_class: str, kind: Kind, block: int, curve: Curve) -> Curve:
        found = factors.get((device_class, kind, block), [1.0])
        factor = sum(found) / len(found)
        return Curve((rows, ms * factor) for rows, ms in curve)

    devices = [
        DeviceTimes(
            device_class=device.device_class,
            blocks=tuple(
                replace(
                    times,
                    teach_ms=scaled(device.device_class, Kind.TEACH, block, times.teach_ms),
                    learn_ms=scaled(device.device_class, Kind.LEARN, block, times.learn_ms),
                )
                for block, times in enumerate(device.blocks)
            ),
        )
        for device in costs.devices
    ]
    return replace(costs, devices=tuple(devices))


def freeze_costs(costs: CostTable, frozen: Collection[int], *, is_observed: Collection[int] = ()) -> CostTable:
    """Give the costs of blocks of which only the loss is still computed: no backward pass, gradient or update.

    Args:
        costs: Of blocks that are trained.
        frozen: Blocks that are trained no longer.
        is_observed: Those of them whose times are already without a backward pass.
    """

    def times(block: int, own: BlockTimes) -> BlockTimes:
        factor = 1.0 if block in is_observed else _FORWARD
        learn_ms = Curve((rows, ms * factor) for rows, ms in own.learn_ms)
        return replace(own, learn_ms=learn_ms, update_ms=0.0) if block in frozen else own

    devices = [
        replace(device, blocks=tuple(times(block, own) for block, own in enumerate(device.blocks)))
        for device in costs.devices
    ]
    blocks = [replace(own, gradient_bytes=0) if block in frozen else own for block, own in enumerate(costs.blocks)]
    return replace(costs, devices=tuple(devices), blocks=tuple(blocks))


def find_better(
    outlook: Outlook, observed: ObservedTimes, *, frozen: Collection[int] = (), frozen_before: Collection[int] = ()
) -> tuple[Outlook, Outlook] | None:
    """Look for a plan that would be faster if blocks go on taking the observed times.

    Args:
        outlook: What was foreseen of the present plan.
        observed: What was seen instead.
        frozen: Blocks that are trained no longer, which was not foreseen.
        frozen_before: Those of them that were not trained when the times were observed, either.

    Returns:
        What is now foreseen of the present plan, and of the better one; `None` if none is better by more than the noise
        and a twentieth.
    """
    seen = {block for _, kind, block, _ in observed if kind is Kind.LEARN}
    costs = freeze_costs(adjust_costs(outlook, observed), frozen, is_observed=seen.intersection(frozen_before))
    measurement: Measurement = replace(outlook.measurement, costs=costs)
    present = replace(outlook, measurement=measurement)
    try:
        better = Outlook.find(
            measurement,
            outlook.cluster,
            exactness=outlook.exactness_wanted,
            max_in_flight=outlook.max_in_flight,
            may_teach_ahead=outlook.may_teach_ahead,
        )
    except PlanError:
        # Only a plan like that which the user gave fits the memory.
        return None
    # An epoch's medians are surer than the few rounds that the noise was measured in.
    worth = max(_WORTH, min(costs.noise, _MOST_NOISE))
    is_worth_it = better.plan != present.plan and better.step_time_ms < (1 - worth) * present.step_time_ms
    return (present, better) if is_worth_it else None


def _curve(times: BlockTimes, kind: Kind) -> Curve:
    return times.teach_ms if kind is Kind.TEACH else times.learn_ms
