"""Drift: training takes other times than those that were measured before, and perhaps another plan would do better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_pipebd.planning.costs import BlockTimes, CostTable, DeviceTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.program import Kind

__all__ = ["ObservedTimes", "adjust_costs", "find_better"]

#: Per rank, action (TEACH or LEARN), block and rows: the time that it took, in ms.
ObservedTimes = Mapping[tuple[int, Kind, int, int], float]

_WORTH = 0.05


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


def find_better(outlook: Outlook, observed: ObservedTimes) -> tuple[Outlook, Outlook] | None:
    """Look for a plan that would be faster if blocks go on taking the observed times.

    Args:
        outlook: What was foreseen of the present plan.
        observed: What was seen instead.

    Returns:
        What is now foreseen of the present plan, and of the better one; `None` if none is better by more than the noise
        and a twentieth.
    """
    measurement: Measurement = replace(outlook.measurement, costs=adjust_costs(outlook, observed))
    present = replace(outlook, measurement=measurement)
    better = Outlook.find(
        measurement, outlook.cluster, exactness=outlook.exactness_wanted, max_in_flight=outlook.max_in_flight
    )
    is_worth_it = better.step_time_ms < (1 - max(_WORTH, measurement.costs.noise)) * present.step_time_ms
    return (present, better) if is_worth_it else None


def _curve(times: BlockTimes, kind: Kind) -> Curve:
    return times.teach_ms if kind is Kind.TEACH else times.learn_ms
