"""The cluster: which rank is which device, on which node, with how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_pipebd.planning.costs import CostTable, LinkCost
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.plain_data import PlainData

__all__ = ["Cluster"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster(PlainData):
    """The ranks that a plan may use; index = rank.

    Args:
        device_class: Class of each rank's device, one that the cost table has times of.
        node: Number of each rank's node.
        memory_limit_bytes: Memory each rank may use; `None` for no limit.

    Raises:
        CostError: The three do not speak about the same ranks, there is no rank, or a limit is not above 0.

    Example:
        >>> cluster = Cluster.uniform(4, ranks_per_node=2)
        >>> cluster.node, cluster.are_on_one_node((0, 1)), cluster.are_on_one_node((1, 2))
        ((0, 0, 1, 1), True, False)
    """

    _subject = "cluster"

    device_class: tuple[str, ...]
    node: tuple[int, ...]
    memory_limit_bytes: tuple[int | None, ...]

    def __post_init__(self) -> None:
        for name in ("device_class", "node", "memory_limit_bytes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.device_class:
            raise CostError("`device_class` must have at least one rank, but is empty. Describe every rank.")
        if not len(self.device_class) == len(self.node) == len(self.memory_limit_bytes):
            raise CostError(
                "`device_class`, `node` and `memory_limit_bytes` must have one entry per rank each, but have "
                f"{len(self.device_class)}, {len(self.node)} and {len(self.memory_limit_bytes)}. Describe every rank."
            )
        for rank, limit in enumerate(self.memory_limit_bytes):
            if limit is not None and limit <= 0:
                raise CostError(
                    f"`memory_limit_bytes[{rank}]` must be above 0, but is {limit}. Write `None` for no limit."
                )

    @classmethod
    def uniform(
        cls,
        num_ranks: int,
        *,
        device_class: str = "default",
        ranks_per_node: int | None = None,
        memory_limit_bytes: int | None = None,
    ) -> Cluster:
        """Give a cluster of equal ranks, numbered node by node; `None` puts all on one node."""
        return cls(
            device_class=(device_class,) * num_ranks,
            node=tuple(rank // (ranks_per_node or num_ranks) for rank in range(num_ranks)),
            memory_limit_bytes=(memory_limit_bytes,) * num_ranks,
        )

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.device_class)

    @property
    def num_nodes(self) -> int:
        """Number of different nodes."""
        return len(set(self.node))

    def are_on_one_node(self, ranks: Sequence[int]) -> bool:
        """Tell whether all these ranks are on the same node."""
        return len({self.node[rank] for rank in ranks}) <= 1

    def link(self, costs: CostTable, ranks: Sequence[int]) -> LinkCost:
        """Give the cost of the links between these ranks: that between nodes if a node does not hold them all."""
        return costs.same_node if self.are_on_one_node(ranks) else costs.other_node
