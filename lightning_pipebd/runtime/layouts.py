"""Layouts: what two ranks must know of a message's tensors beside their bytes, sent once and then by number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["LayoutBook", "TensorLayout", "describe", "flatten", "flatten_tree", "restore_tree"]

_NUM_LAYOUTS = 128
_LEAF = 0
#: Leaves that are equal only if they are the same; a float is equal to other types' values, and zero to minus zero.
_PLAIN = (type(None), bool, int, str)


class TensorLayout(NamedTuple):
    """How a tensor's values lie in memory, in a message and for whoever uses them.

    Attributes:
        shape: Of the tensor.
        strides: In the message: dense, but not always in the order of the dimensions.
        dtype: Of the values.
        is_cuda: Whether they were on a GPU.
        wanted: Strides that the tensor had, if it is not dense: a slice has gaps, an expanded tensor repeats itself.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_cuda: bool
    wanted: tuple[int, ...] | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def new_flat(self, device: torch.device | None = None) -> Tensor:
        """Give room for the values: one dimension, as :func:`flatten` gives them."""
        return torch.empty(self.num_elements, dtype=self.dtype, device=device)

    def restore(self, flat: Tensor) -> Tensor:
        """Give the tensor whose values lie in ``flat``, without a copy if it is dense."""
        dense = flat.as_strided(self.shape, self.strides)
        if self.wanted is None:
            return dense
        for dim, stride in enumerate(self.wanted):
            dense = dense.narrow(dim, 0, 1) if stride == 0 else dense
        return (
            torch.empty_strided(dense.shape, self.wanted, dtype=flat.dtype, device=flat.device)
            .copy_(dense)
            .expand(self.shape)
        )


def describe(tensor: Tensor) -> tuple[Tensor, TensorLayout]:
    """Give the tensor with memory that holds its values densely, copied only if it must be, and its layout.

    A tensor keeps its strides, those of a permuted one (``channels_last``) as those of a slice: kernels may add in
    another order for others, and blocks on two ranks shall compute what they compute on one.
    """
    dense = tensor.detach().resolve_conj().resolve_neg()
    wanted = None
    if not dense.is_contiguous() and torch.empty_like(dense, device="meta").stride() != dense.stride():
        wanted = dense.stride() if _has_own_places(dense) else None
        dense = dense.contiguous()
    return dense, TensorLayout(tuple(dense.shape), dense.stride(), dense.dtype, dense.is_cuda, wanted)


def _has_own_places(tensor: Tensor) -> bool:
    """Whether values share no memory, but for those that are repeated along a dimension, and there is one at all."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return tensor.numel() > 0


def flatten(dense: Tensor) -> Tensor:
    """Give a dense tensor's values in the order of its memory, without a copy."""
    return dense.as_strided((dense.numel(),), (1,))


def flatten_tree(tree: Any) -> tuple[list[Any], Any, bool]:
    """Give the leaves of a tree, its structure, and whether that is plain: hashable, equal only to its like.

    A plain tree is made of tuples, lists and dictionaries; what messages mostly are takes a few microseconds. Any other
    has torch's structure.

    Example:
        >>> leaves, structure, is_plain = flatten_tree(((torch.zeros(2), [True]), None))
        >>> restore_tree(structure, leaves), is_plain
        (((tensor([0., 0.]), [True]), None), True)
    """
    leaves: list[Any] = []
    try:
        structure = _outline(tree, leaves)
    except _NotPlainError:
        return *pytree.tree_flatten(tree), False
    return leaves, structure, True


def restore_tree(structure: Any, leaves: Sequence[Any]) -> Any:
    """Give the tree of a structure with these leaves."""
    if isinstance(structure, pytree.TreeSpec):
        return pytree.tree_unflatten(leaves, structure)
    return _fill(structure, iter(leaves))


class _NotPlainError(Exception):
    """A tree has something else in it than plain containers, tensors and simple values."""


def _outline(tree: Any, leaves: list[Any]) -> Any:
    kind = type(tree)
    if isinstance(tree, Tensor) or kind in _PLAIN:
        leaves.append(tree)
        return _LEAF
    if kind is tuple or kind is list:
        return kind.__name__, tuple([_outline(child, leaves) for child in tree])
    if kind is dict and all(type(key) is str for key in tree):
        return tuple(tree), tuple([_outline(child, leaves) for child in tree.values()])
    raise _NotPlainError


def _fill(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure == _LEAF:
        return next(leaves)
    names, children = structure
    filled = [_fill(child, leaves) for child in children]
    if isinstance(names, tuple):
        return dict(zip(names, filled, strict=True))
    return filled if names == "list" else tuple(filled)


class LayoutBook:
    """Numbers for layouts, so that a layout that both sides know is sent as a number.

    Sender and receiver of a lane forget the oldest layout at the same message, hence stay in step without talking.
    """

    def __init__(self) -> None:
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._layouts: OrderedDict[int, Any] = OrderedDict()
        self._next = 0

    def number(self, layout: Hashable) -> tuple[int, bool]:
        """Give the number of a layout, or of whatever stands for it, and whether the receiver does not know it yet."""
        known = self._numbers.get(layout)
        if known is not None:
            return known, False
        number = self._next
        self._next += 1
        self._numbers[layout] = number
        if len(self._numbers) > _NUM_LAYOUTS:
            self._numbers.popitem(last=False)
        return number, True

    def add(self, number: int, layout: Any) -> None:
        """Take in a layout that the sender numbered."""
        self._layouts[number] = layout
        if len(self._layouts) > _NUM_LAYOUTS:
            self._layouts.popitem(last=False)

    def layout(self, number: int) -> Any:
        """Give the layout of a number."""
        return self._layouts[number]
