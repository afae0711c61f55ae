"""Work of which all ranks must learn the outcome, so that a failure on one of them is raised on all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_pipebd.runtime.transport import Transport

__all__ = ["done_by_all", "done_by_rank_zero"]

T = TypeVar("T")


def done_by_all(transport: Transport, work: Callable[[], T]) -> list[T]:
    """**Collective** over all ranks: work on every rank, and give every rank's result, in rank order.

    Args:
        transport: Reaches the other ranks.
        work: Must not wait for other ranks: a rank whose work fails would leave them waiting.

    Raises:
        Exception: What the first rank that failed has raised, on every rank.
    """
    mine: tuple[Any, BaseException | None] = (None, None)
    try:
        mine = (work(), None)
    except Exception as error:
        mine = (None, error)
    outcomes = transport.all_gather_object((mine[0], _portable(mine[1])))
    if mine[1] is not None:
        raise mine[1]
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def done_by_rank_zero(transport: Transport, work: Callable[[], T]) -> T:
    """**Collective** over all ranks: work on rank 0 alone, and give its result to all.

    Raises:
        Exception: What rank 0 has raised, on every rank.
    """
    return done_by_all(transport, work if transport.rank == 0 else lambda: None)[0]  # type: ignore[return-value]


def _portable(error: BaseException | None) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
