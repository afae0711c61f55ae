"""What a fit refuses where ranks meet in the BatchNorm of shared blocks."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from types import SimpleNamespace

import pytest
from torch import nn

from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.session import TrainingSession

HALF = Fraction(1, 2)
TO_AND_FRO = Plan(
    num_ranks=2,
    teacher=tuple(((rank, Fraction(1)),) for rank in (0, 1, 0, 1)),
    student=(((0, HALF), (1, HALF)),) * 4,
)


class Groups:
    """Remembers the sets of ranks that were asked for."""

    def layer_groups(self, groups: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], str]:
        self.asked = list(groups)
        return {ranks: f"group of {ranks}" for ranks in self.asked}


def session_of(plan: Plan, *, with_norms: set[int], rank: int = 0) -> tuple[TrainingSession, Groups]:
    """A session that knows its plan, its blocks and its ranks."""
    session, groups = TrainingSession.__new__(TrainingSession), Groups()
    blocks = [nn.Sequential(nn.BatchNorm1d(2) if block in with_norms else nn.ReLU()) for block in range(4)]
    student = nn.Sequential(*blocks)
    session._plan = plan
    session._learned = [block for block in range(plan.num_blocks) if rank in plan.student_ranks(block)]
    session._module = SimpleNamespace(
        student=student,
        target_blocks=frozenset(),
        block_pairs=SimpleNamespace(student=SimpleNamespace(blocks=list(student))),
    )
    session.synchronise_batch_norm(groups)
    return session, groups


def test_every_rank_asks_for_the_groups_of_all_shared_blocks_with_batch_norm() -> None:
    plan = Plan.hybrid([(2, 2), (2, 1)])
    for rank in range(plan.num_ranks):
        session, groups = session_of(plan, with_norms={1, 2}, rank=rank)
        assert groups.asked == [(0, 1)]
        replaced = [isinstance(block[0], nn.SyncBatchNorm) for block in session._module.student]
        assert replaced == [False, rank < 2, False, False]


def test_plan_under_which_ranks_would_wait_for_each_other_is_refused() -> None:
    session, _ = session_of(TO_AND_FRO, with_norms={0, 1})
    with pytest.raises(ValueError, match=r"`sync_batchnorm` must .* rank 0 would wait for ever at LEARN block=0"):
        session._check_rows(8)
    session_of(TO_AND_FRO, with_norms={3})[0]._check_rows(8)


def test_batch_without_rows_for_a_rank_is_refused_where_it_would_be_waited_for() -> None:
    with pytest.raises(ValueError, match=r"shares block 0 must have a row .* 1 rows for 2 ranks"):
        session_of(TO_AND_FRO, with_norms={0})[0]._check_rows(1)
    session_of(TO_AND_FRO, with_norms=set())[0]._check_rows(1)
