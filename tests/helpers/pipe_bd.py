"""Pipe-BD's blocks, rebuilt from the breakdown on its poster.

The poster shows seconds per epoch of 4 ranks: data loading 0.94 on rank 0; teachers 1.57, 1.03, 1.36, 0.58; students
7.55, 7.07, 8.40, 5.12; idle 0, 2.26, 0.87, 4.75; "ideal" 8.31. It does not show blocks: the 6 blocks are given to the
ranks as 1, 1, 2 and 2, and how a rank's time divides among its two blocks is assumed. Seconds per epoch are taken as ms
per step, at a batch of 256 rows. The times at 64 rows come from the poster's data-parallel bar: students 19.89, and
teachers 7.19 for 3.5 times the work. Receiving holds up the rank, as in the published code; the bandwidth is
chosen so that ranks 1 and 2 idle about as long as the poster shows.
"""

from __future__ import annotations

from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes, LinkCost, LoaderCost
from lightning_pipebd.planning.curve import Curve

__all__ = ["pipe_bd_costs"]

TEACHERS_MS = [1.57, 1.03, 0.68, 0.68, 0.40, 0.18]
STUDENTS_MS = [7.55, 7.07, 4.20, 4.20, 3.30, 1.82]
#: What 64 rows take of the time of 256.
TEACHER_QUARTER = 7.19 / 3.5 / sum(TEACHERS_MS)
STUDENT_QUARTER = 19.89 / sum(STUDENTS_MS)
MIB = 2**20
#: Sizes of the six boundaries at a batch of 256 on CIFAR-10, and of the last block's output.
BOUNDARY_MIB = [3, 24, 8, 4, 6, 2.5, 2.5]


def pipe_bd_costs(*, receive_occupation: float) -> CostTable:
    """Give the costs at a batch of 256 rows; receiving holds up a rank for this part of the transfer."""
    times = [
        BlockTimes(
            teach_ms=Curve([(64, teacher * TEACHER_QUARTER), (256, teacher)]),
            learn_ms=Curve([(64, student * STUDENT_QUARTER), (256, student)]),
        )
        for teacher, student in zip(TEACHERS_MS, STUDENTS_MS, strict=True)
    ]
    return CostTable(
        blocks=tuple(BlockSizes(name=f"block{block}") for block in range(6)),
        devices=(DeviceTimes(device_class="default", blocks=tuple(times)),),
        boundary_bytes_per_row=tuple(int(size * MIB / 256) for size in BOUNDARY_MIB),
        same_node=LinkCost(bytes_per_ms=10 * MIB, receive_occupation=receive_occupation),
        loader=LoaderCost(fixed_ms=0.34, per_row_ms=0.6 / 256, occupation=1.0),
    )
