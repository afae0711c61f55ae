from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.selection import select_candidates

NUMBERS = st.integers(0, 9)
PLACES = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), max_size=4)


@given(PLACES, st.none() | st.integers(0, 40))
def test_selection_is_as_good_as_the_best_of_all_choices(
    places: list[list[tuple[int, int]]], max_size: int | None
) -> None:
    losses = [[loss for loss, _ in place] for place in places]
    sizes = [[size for _, size in place] for place in places]
    fitting = [
        sum(loss for loss, _ in choice)
        for choice in product(*places)
        if max_size is None or sum(size for _, size in choice) <= max_size
    ]
    if not fitting:
        with pytest.raises(ValueError, match="`max_size` must leave room for the smallest candidates"):
            select_candidates(losses, sizes, max_size)
        return
    chosen = select_candidates(losses, sizes, max_size)
    pairs = [place[number] for place, number in zip(places, chosen, strict=True)]
    assert sum(loss for loss, _ in pairs) == min(fitting)
    assert max_size is None or sum(size for _, size in pairs) <= max_size


def test_of_equal_losses_the_smaller_is_chosen() -> None:
    assert select_candidates([[1.0, 1.0]], [[5, 3]]) == (1,)


def test_losses_and_sizes_must_fit() -> None:
    with pytest.raises(ValueError, match="`sizes` must have one entry for each of the losses"):
        select_candidates([[1.0, 2.0]], [[5]])
