"""What fails on one rank is raised on all."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_pipebd.runtime.agreement import done_by_all, done_by_rank_zero
from lightning_pipebd.runtime.local_transport import LocalWorld
from tests.helpers.ranks import run_threads


class Unportable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def outcomes(work: Any) -> list[str]:
    world = LocalWorld(3)

    def run(rank: int) -> str:
        try:
            return str(work(world.transports[rank], rank))
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return run_threads(3, run)


def test_every_rank_gets_all_results() -> None:
    assert outcomes(lambda transport, rank: done_by_all(transport, lambda: rank * 2)) == ["[0, 2, 4]"] * 3


def test_rank_zero_works_for_all() -> None:
    assert outcomes(lambda transport, rank: done_by_rank_zero(transport, lambda: f"by {rank}")) == ["by 0"] * 3


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_is_raised_on_every_rank(failing: int) -> None:
    def work(rank: int) -> int:
        if rank == failing:
            raise KeyError("no such block")
        return rank

    assert (
        outcomes(lambda transport, rank: done_by_all(transport, lambda: work(rank)))
        == ["KeyError: 'no such block'"] * 3
    )


def test_a_failure_that_cannot_travel_is_told_in_words() -> None:
    def work() -> None:
        raise Unportable("bad luck", "twice")

    assert outcomes(lambda transport, rank: done_by_rank_zero(transport, work)) == [
        "Unportable: bad luck",
        *["RuntimeError: Unportable: bad luck"] * 2,
    ]
