"""The connections between the ranks of a strategy, which outlive a fit."""

from __future__ import annotations

from datetime import timedelta

from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.runtime.transport import ProcessGroupTransport

__all__ = ["connect_ranks"]


def connect_ranks(
    strategy: ProcessGroupStrategy, before: ProcessGroupTransport | None, timeout: timedelta
) -> ProcessGroupTransport:
    """**Collective** over all ranks: give what reaches the others; what did so before, if nothing has failed since.

    Args:
        strategy: Whose ranks they are.
        before: What reached them in an earlier fit or evaluation.
        timeout: Time after which a collective fails.
    """
    if before is not None and before.is_usable:
        return before
    return ProcessGroupTransport(strategy.root_device, timeout=timeout)
