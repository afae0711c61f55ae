"""The measurement: a cost table and what it was measured of, so that a plan can be found from a file alone."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.explain import BlockTraits, Exactness
from lightning_pipebd.planning.plain_data import PlainData
from lightning_pipebd.planning.planner import PlanChoice, find_plan

__all__ = ["Measurement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement(PlainData):
    """What was measured of a module and its batch.

    Args:
        costs: The measured times and sizes.
        num_rows: Rows of the batch that was measured.
        traits: What decides how exactly each block can be repeated; empty if nothing is known.
        target_blocks: Student blocks whose loss reads the labels.
        whole_reason: Why no job's rows may be divided; empty if they may.
        has_momentum: Whether each teacher block follows its student block, and must be on ranks that train it.

    Raises:
        CostError: The traits are of another number of blocks, or a number is impossible.
    """

    _subject = "measurement"

    costs: CostTable
    num_rows: int
    traits: tuple[BlockTraits, ...] = ()
    target_blocks: tuple[int, ...] = ()
    whole_reason: str = ""
    has_momentum: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "traits", tuple(self.traits))
        object.__setattr__(self, "target_blocks", tuple(sorted(self.target_blocks)))
        if self.num_rows < 1:
            raise CostError(f"`num_rows` must be at least 1, but is {self.num_rows}. Give the rows of a batch.")
        if self.traits and len(self.traits) != self.costs.num_blocks:
            raise CostError(
                f"`traits` must be empty or have one entry for each of the {self.costs.num_blocks} blocks, but has "
                f"{len(self.traits)}. Describe every block."
            )
        if any(not 0 <= block < self.costs.num_blocks for block in self.target_blocks):
            raise CostError(
                f"`target_blocks` must be below {self.costs.num_blocks}, but are {list(self.target_blocks)}. "
                "Blocks are counted from 0."
            )

    def find_plan(
        self,
        cluster: Cluster,
        *,
        exactness: Exactness | str | None = None,
        max_in_flight: int = 2,
        may_teach_ahead: bool = False,
    ) -> PlanChoice:
        """Find the plan with the smallest step time for the measured batch; see :func:`find_plan`.

        Raises:
            PlanError: Nothing fits the memory; the message has what every rank would need.
        """
        return find_plan(
            self.costs,
            cluster,
            num_rows=self.num_rows,
            exactness=Exactness.BITWISE if self.whole_reason else exactness,
            traits=self.traits,
            target_blocks=self.target_blocks,
            max_in_flight=max_in_flight,
            has_momentum=self.has_momentum,
            may_teach_ahead=may_teach_ahead,
        )
