"""Layouts: what two ranks must know of a message's tensors beside their bytes, sent once and then by number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "LayoutBook",
    "TensorLayout",
    "describe",
    "flatten",
    "flatten_tree",
    "keep_gradient_layouts",
    "restore_tree",
    "without_gaps",
]

_NUM_LAYOUTS = 128
_LEAF = 0
#: Leaves that are equal only if they are the same; a float is equal to other types' values, and zero to minus zero.
_PLAIN = (type(None), bool, int, str)


class TensorLayout(NamedTuple):
    """How a tensor's values lie in memory; dense, but not always in the order of its dimensions."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_cuda: bool

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def new_flat(self, device: torch.device | None = None) -> Tensor:
        """Give room for the values, in host memory or on a device: one dimension, as :func:`flatten` gives them."""
        return torch.empty(self.num_elements, dtype=self.dtype, device=device or "cpu")

    def restore(self, flat: Tensor) -> Tensor:
        """Give the tensor whose values lie in ``flat``, without a copy."""
        return flat.as_strided(self.shape, self.strides)


def describe(tensor: Tensor) -> tuple[Tensor, TensorLayout]:
    """Give the tensor with memory that holds its values densely, copied only if it must be, and its layout.

    A permuted tensor keeps its order in memory (``channels_last``): kernels may add in another order for another
    one, and blocks on two ranks shall compute what they compute on one.
    """
    dense = _without_gaps(tensor.detach().resolve_conj().resolve_neg())
    return dense, TensorLayout(tuple(dense.shape), dense.stride(), dense.dtype, dense.is_cuda)


def without_gaps(tree: Any) -> Any:
    """Give a tree whose tensors lie densely in memory, copied only where they must be; gradients pass.

    That is what arrives at another rank. A slice (``x[:, :8]``) keeps the strides of the whole on the rank that made
    it, and kernels add in another order for other strides: a block must get the same on both.

    Example:
        >>> without_gaps(torch.zeros(4, 6)[:, :2]).stride(), without_gaps(torch.zeros(4, 6).t()).stride()
        ((2, 1), (1, 6))
    """
    if isinstance(tree, Tensor):
        return _without_gaps(tree)
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    if all(map(_is_dense, leaves)):
        return tree
    return pytree.tree_map_only(Tensor, _without_gaps, tree)


def keep_gradient_layouts(tree: Any) -> None:
    """Have the gradients of a tree's tensors come in the order in memory of the tensors themselves.

    So they do where a graph is cut, at a leaf; within one graph they come as the next operation left them.
    """
    for leaf in [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.layout is torch.strided:
            leaf.register_hook(partial(_in_layout, leaf.stride()))


def _in_layout(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    if gradient.stride() == strides:
        return gradient
    ordered = torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device)
    return ordered.copy_(gradient)


def _without_gaps(tensor: Tensor) -> Tensor:
    return tensor if _is_dense(tensor) else tensor.contiguous()


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_contiguous():
        return True
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


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
