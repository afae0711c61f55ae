"""Trees of tensors whose leaves are cut and joined along the rows of the batch.

A boundary is a tree: some leaves have one entry per row of the batch (hidden states), others are the same for all rows
(rotary tables). Only a comparison of two row counts can tell them apart: a mask of shape ``(64, 64)`` may be either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd.planning.plan import Rows

__all__ = [
    "RowTree",
    "count_rows",
    "divide_rows",
    "find_row_leaves",
    "holds_rows",
    "join_rows",
    "leading_row_leaves",
    "take_rows",
    "tree_bytes",
    "tree_leaves",
    "versions_of",
]


class RowTree:
    """A tree of tensors for some rows of the batch.

    Attributes:
        rows: Rows of the batch that the tree holds.
        tree: Tuple, list, dict or tensor, nested.
        row_leaves: Per leaf of the tree (in flattening order) whether its first dimension is the rows; ``None`` while
            unknown, which is fine as long as nobody cuts or joins the tree.
        versions: How often each tensor had been changed in place when that was noted; ``None`` where nobody asks.
    """

    __slots__ = ("row_leaves", "rows", "tree", "versions")

    def __init__(self, rows: Rows, tree: Any, row_leaves: tuple[bool, ...] | None = None) -> None:
        self.rows = rows
        self.tree = tree
        self.row_leaves = row_leaves
        self.versions: list[int] | None = None

    def note_versions(self) -> None:
        """Have :attr:`is_as_noted` compare with how the tree is now."""
        self.versions = versions_of(self.tree)

    @property
    def is_as_noted(self) -> bool:
        """Whether no tensor was changed in place since :meth:`note_versions`; true if that was never called."""
        return self.versions is None or self.versions == versions_of(self.tree)


def versions_of(tree: Any) -> list[int]:
    """Give how often each tensor of a tree was changed in place; tensors of inference mode do not count that."""
    if isinstance(tree, Tensor):
        return [] if tree.is_inference() else [tree._version]
    leaves = pytree.tree_leaves(tree)
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def count_rows(tree: Any) -> int:
    """Count the rows of a collated batch: the first dimension of its first tensor that has one.

    Raises:
        ValueError: No leaf is a tensor with at least one dimension.

    Example:
        >>> count_rows((torch.zeros(8, 3), torch.zeros(8)))
        8
    """
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    msg = (
        "`batch` must hold at least one tensor whose first dimension is the rows, but it holds none. "
        "Let the loader's collate function return tensors."
    )
    raise ValueError(msg)


def leading_row_leaves(tree: Any, num_rows: int) -> tuple[bool, ...]:
    """Tell which leaves of a collated batch have one entry per row: tensors whose first dimension has that length."""
    leaves = tree_leaves(tree)
    return tuple(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == num_rows for leaf in leaves)


def find_row_leaves(output: Any, num_rows: int, probe: Any, num_probe_rows: int, *, subject: str) -> tuple[bool, ...]:
    """Tell which leaves of a block's output have one entry per row, from outputs for two row counts.

    Args:
        output: Output for ``num_rows`` rows.
        num_rows: Rows of ``output``.
        probe: Output of the same block for another number of rows.
        num_probe_rows: Rows of ``probe``.
        subject: Names the block in the error.

    Raises:
        ValueError: A tensor follows the number of rows in another dimension than the first, or a number follows it.

    Example:
        >>> find_row_leaves(
        ...     (torch.zeros(4, 2), torch.zeros(4, 4)), 4, (torch.zeros(1, 2), torch.zeros(4, 4)), 1, subject="block 0"
        ... )
        (True, False)
    """
    flags = []
    for whole, part in zip(tree_leaves(output), tree_leaves(probe), strict=True):
        if not isinstance(whole, Tensor):
            _check_constant(whole, part, num_rows, num_probe_rows, subject)
            flags.append(False)
        elif whole.shape == part.shape:
            flags.append(False)
        elif (whole.shape, part.shape) == ((num_rows, *whole.shape[1:]), (num_probe_rows, *whole.shape[1:])):
            flags.append(True)
        else:
            msg = (
                f"`{subject}` must give one entry per row in the first dimension of its output, but gave shape "
                f"{tuple(whole.shape)} for {num_rows} rows and {tuple(part.shape)} for {num_probe_rows}. "
                "Use a plan that keeps all rows of a block on one rank, or put the rows first."
            )
            raise ValueError(msg)
    return tuple(flags)


def _check_constant(whole: Any, part: Any, num_rows: int, num_probe_rows: int, subject: str) -> None:
    # A number cannot be cut or joined, and a block that is told of 64 rows while it gets 32 computes something else.
    if isinstance(whole, (int, float)) and whole != part:
        msg = (
            f"`{subject}` must give numbers that are the same for any number of rows, but gave {whole!r} for "
            f"{num_rows} rows and {part!r} for {num_probe_rows}. Use a plan that keeps all rows of a block on one "
            "rank, or let the next block read the number off a tensor's shape."
        )
        raise ValueError(msg)


def take_rows(piece: RowTree, rows: Rows) -> RowTree:
    """Take some of a tree's rows; all of them gives the tree itself, without a copy."""
    if rows == piece.rows:
        return piece
    start, stop = rows.start - piece.rows.start, rows.stop - piece.rows.start
    flags = _known(piece)
    return RowTree(rows, _map_rows(piece.tree, flags, lambda leaf: leaf[start:stop]), flags)


def join_rows(pieces: Sequence[RowTree], rows: Rows) -> RowTree:
    """Join pieces that together hold ``rows`` (they may hold more, never less) into one tree.

    Raises:
        LookupError: A row is in no piece.
        ValueError: The rows have other shapes in one piece than in another.
    """
    for piece in pieces:
        if piece.rows == rows:
            return piece
    taken: list[RowTree] = []
    position = rows.start
    for piece in sorted(pieces, key=lambda piece: piece.rows):
        if piece.rows.start <= position < piece.rows.stop:
            stop = min(piece.rows.stop, rows.stop)
            taken.append(take_rows(piece, Rows(position, stop)))
            position = stop
    if position < rows.stop:
        msg = f"rows {position}:{rows.stop} are not present"
        raise LookupError(msg)
    if len(taken) == 1:
        return taken[0]
    flags = _known(taken[0])
    leaves = zip(*(tree_leaves(piece.tree) for piece in taken), strict=True)
    joined = [_join_leaf(parts, taken) if flag else parts[0] for flag, parts in zip(flags, leaves, strict=True)]
    return RowTree(rows, pytree.tree_unflatten(joined, pytree.tree_structure(taken[0].tree)), flags)


def _join_leaf(parts: Sequence[Tensor], pieces: Sequence[RowTree]) -> Tensor:
    shapes = {part.shape[1:]: piece.rows for part, piece in zip(parts, pieces, strict=True)}
    if len(shapes) > 1:
        each = " and ".join(f"{tuple(shape)} in rows {rows}" for shape, rows in shapes.items())
        msg = (
            f"`batch` must have rows of one shape, but they are {each}. Where several ranks load, each collates its "
            "own rows: pad all batches to one length, or choose a plan in which one rank has the teacher's block 0."
        )
        raise ValueError(msg)
    return torch.cat(tuple(parts))


def holds_rows(pieces: Sequence[RowTree], rows: Rows) -> bool:
    """Tell whether pieces together hold ``rows``."""
    position = rows.start
    for piece in sorted(pieces, key=lambda piece: piece.rows):
        if piece.rows.start <= position:
            position = max(position, piece.rows.stop)
    return position >= rows.stop


def _known(piece: RowTree) -> tuple[bool, ...]:
    assert piece.row_leaves is not None, "a tree was cut or joined whose row leaves are unknown"
    return piece.row_leaves


def tree_leaves(tree: Any) -> list[Any]:
    """Give the leaves of a tree; mostly it is a tensor."""
    return [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)


def _map_rows(tree: Any, flags: tuple[bool, ...], function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree) if flags[0] else tree
    leaves, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten(
        [function(leaf) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)], spec
    )


def divide_rows(tree: Any, num_rows: int, row_counts: Sequence[int]) -> dict[int, Any]:
    """Give the first rows of a batch's tree, for each of some numbers of rows."""
    whole = RowTree(Rows(0, num_rows), tree, leading_row_leaves(tree, num_rows))
    return {rows: take_rows(whole, Rows(0, rows)).tree for rows in row_counts}


def tree_bytes(tree: Any) -> int:
    """Give the bytes of all tensors of a tree."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
