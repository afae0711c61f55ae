from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.row_trees import (
    RowTree,
    count_rows,
    find_row_leaves,
    holds_rows,
    join_rows,
    leading_row_leaves,
    take_rows,
)


class Pair(NamedTuple):
    left: Any
    right: Any


def piece(start: int, stop: int) -> RowTree:
    """A tree whose rows hold their own numbers, beside a leaf that they share."""
    return RowTree(Rows(start, stop), (torch.arange(start, stop), torch.zeros(4)), (True, False))


@st.composite
def covers(draw: st.DrawFn) -> tuple[list[RowTree], Rows]:
    """Pieces in any order that hold at least some rows, with overlaps and rows beyond."""
    start = draw(st.integers(0, 10))
    stop = start + draw(st.integers(1, 10))
    borders = sorted({start, stop, *draw(st.lists(st.integers(start, stop), max_size=4))})
    longer = st.integers(0, 3)
    pieces = [piece(max(0, first - draw(longer)), last + draw(longer)) for first, last in pairwise(borders)]
    return draw(st.permutations(pieces)), Rows(start, stop)


class TestCounting:
    @pytest.mark.parametrize(
        ("batch", "num_rows"),
        [
            (torch.zeros(3, 2), 3),
            ({"id": 7, "name": ["a"], "scale": torch.tensor(1.0), "x": torch.zeros(5)}, 5),
            ([torch.zeros(0, 4), torch.zeros(2)], 0),
        ],
    )
    def test_first_tensor_with_a_dimension_counts(self, batch: Any, num_rows: int) -> None:
        assert count_rows(batch) == num_rows

    @pytest.mark.parametrize("batch", [None, [], ["a", "b"], (torch.tensor(1.0), 3)])
    def test_batch_without_such_a_tensor_is_refused(self, batch: Any) -> None:
        with pytest.raises(ValueError, match="`batch` must hold at least one tensor whose first dimension is the rows"):
            count_rows(batch)


class TestFinding:
    def test_tensors_as_long_as_the_batch_follow_its_rows(self) -> None:
        batch = [torch.zeros(3), torch.zeros(2, 3), torch.tensor(3), "abc", None, torch.zeros(3, 0)]
        assert leading_row_leaves(batch, 3) == (True, False, False, False, False, True)

    def test_leaf_that_two_numbers_of_rows_give_the_same_shape_is_shared(self) -> None:
        outputs = [(torch.zeros(rows, 3), {"mask": torch.zeros(4, 4), "none": None, "width": 3}) for rows in (4, 1)]
        assert find_row_leaves(outputs[0], 4, outputs[1], 1, subject="block") == (True, False, False, False)

    @pytest.mark.parametrize(
        ("whole", "probe"),
        [
            (torch.zeros(3, 4), torch.zeros(3, 1)),  # rows in the last dimension
            (torch.zeros(8, 3), torch.zeros(2, 3)),  # two entries per row
            (torch.zeros(4, 5), torch.zeros(1, 2)),  # another dimension follows too
            (torch.zeros(4), torch.zeros(())),
        ],
    )
    def test_rows_elsewhere_than_in_the_first_dimension_are_refused(self, whole: Any, probe: Any) -> None:
        with pytest.raises(ValueError, match=r"`block 3` must give one entry per row .* for 4 rows and .* for 1"):
            find_row_leaves((whole,), 4, (probe,), 1, subject="block 3")

    def test_number_that_follows_the_rows_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"`block 3` must give numbers .* gave 4 for 4 rows and 1 for 1"):
            find_row_leaves((torch.zeros(4), 4), 4, (torch.zeros(1), 1), 1, subject="block 3")


class TestTaking:
    def test_all_rows_are_the_tree_itself_whatever_its_leaves(self) -> None:
        whole = RowTree(Rows(2, 4), "unknown")
        assert take_rows(whole, Rows(2, 4)) is whole

    def test_some_rows_are_counted_from_the_start_of_the_batch(self) -> None:
        taken = take_rows(piece(4, 10), Rows(5, 7))
        assert (taken.rows, taken.tree[0].tolist(), taken.tree[1].tolist()) == (Rows(5, 7), [5, 6], [0.0] * 4)

    def test_containers_are_kept(self) -> None:
        leaf = torch.arange(4)
        tree = OrderedDict(b=[leaf, (leaf, None)], a=Pair(leaf, "text"))
        taken = take_rows(RowTree(Rows(0, 4), tree, (True, False, False, True, False)), Rows(1, 2))
        assert type(taken.tree) is OrderedDict
        assert list(taken.tree) == ["b", "a"]
        assert taken.tree["a"] == Pair(torch.tensor([1]), "text")
        assert [len(taken.tree["b"][0]), len(taken.tree["b"][1][0])] == [1, 4]

    def test_no_copy_is_made(self) -> None:
        whole = piece(0, 4)
        assert take_rows(whole, Rows(0, 2)).tree[0].data_ptr() == whole.tree[0].data_ptr()


class TestJoining:
    @given(covers())
    def test_pieces_in_any_order_with_any_overlap_give_every_row_once(self, cover: tuple[list[RowTree], Rows]) -> None:
        pieces, rows = cover
        joined = join_rows(pieces, rows)
        assert holds_rows(pieces, rows)
        assert (joined.rows, joined.row_leaves) == (rows, (True, False))
        assert joined.tree[0].tolist() == list(range(rows.start, rows.stop))
        assert joined.tree[1].shape == (4,)

    @given(covers(), st.integers(0, 19))
    def test_missing_row_is_named(self, cover: tuple[list[RowTree], Rows], hole: int) -> None:
        pieces, rows = cover
        pieces = [piece for piece in pieces if not piece.rows.contains(Rows(hole, hole + 1))]
        covered = {row for piece in pieces for row in range(piece.rows.start, piece.rows.stop)}
        missing = [row for row in range(rows.start, rows.stop) if row not in covered]
        assert holds_rows(pieces, rows) == (not missing)
        if missing:
            with pytest.raises(LookupError, match=f"rows {missing[0]}:{rows.stop} are not present"):
                join_rows(pieces, rows)

    def test_one_piece_that_fits_is_given_as_it_is(self) -> None:
        whole = RowTree(Rows(0, 2), "unknown")
        assert join_rows([whole], Rows(0, 2)) is whole

    def test_pieces_of_other_structure_do_not_join(self) -> None:
        other = RowTree(Rows(2, 4), (torch.arange(2),), (True,))
        with pytest.raises(ValueError, match=r"longer|shorter"):
            join_rows([piece(0, 2), other], Rows(0, 4))

    def test_rows_of_other_lengths_do_not_join(self) -> None:
        parts = [RowTree(Rows(row, row + 2), torch.zeros(2, 5 + row), (True,)) for row in (0, 2)]
        with pytest.raises(ValueError, match=r"rows of one shape.*\(5,\) in rows 0:2 and \(7,\) in rows 2:4.*pad all"):
            join_rows(parts, Rows(0, 4))

    def test_cutting_what_is_unknown_is_our_own_mistake(self) -> None:
        with pytest.raises(AssertionError, match="row leaves are unknown"):
            take_rows(RowTree(Rows(0, 4), torch.zeros(4)), Rows(0, 2))
