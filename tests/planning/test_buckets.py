from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.buckets import BUCKET_BYTES, find_buckets
from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Action, Kind, Program
from tests.helpers.plans import plans

SIZES = st.lists(st.integers(0, 2 * BUCKET_BYTES), min_size=12, max_size=12)


def buckets_of(*reduces: tuple[int, Sequence[int]], small: int = 8) -> list[tuple[int, ...]]:
    program = Program(0, 8, tuple(Action(Kind.REDUCE, block, ranks=tuple(ranks)) for block, ranks in reduces))
    return list(find_buckets(program, dict.fromkeys(range(12), small)).values())


def test_blocks_of_other_ranks_are_kept_apart_and_do_not_divide_a_bucket() -> None:
    assert buckets_of((0, [0, 1]), (1, [0, 1]), (2, [0, 2]), (3, [0, 1])) == [(2,), (0, 1, 3)]


def test_bucket_that_is_large_enough_takes_no_more() -> None:
    assert buckets_of(*((block, [0, 1]) for block in range(5)), small=BUCKET_BYTES // 2) == [(0, 1), (2, 3), (4,)]


def test_program_without_reductions_has_no_buckets() -> None:
    assert buckets_of() == []


@given(plan=plans(), num_rows=st.integers(1, 12), sizes=SIZES)
def test_ranks_that_share_blocks_come_to_the_same_buckets_in_one_order(
    plan: Plan, num_rows: int, sizes: list[int]
) -> None:
    seen: dict[tuple[int, ...], set[tuple[tuple[int, ...], ...]]] = {}
    for program in compile_programs(plan, num_rows):
        buckets = find_buckets(program, dict(enumerate(sizes)))
        reduced = {action.index: action.ranks for action in program.actions if action.kind is Kind.REDUCE}
        assert sorted(block for bucket in buckets.values() for block in bucket) == sorted(reduced)
        assert all(len({reduced[block] for block in bucket}) == 1 for bucket in buckets.values())
        # Sums begin in the order of their last blocks, which is one order for all ranks.
        assert [bucket[-1] for bucket in buckets.values()] == list(buckets) == sorted(buckets)
        for ranks in set(reduced.values()):
            seen.setdefault(ranks, set()).add(tuple(own for own in buckets.values() if reduced[own[0]] == ranks))
    assert all(len(ways) == 1 for ways in seen.values())
