"""Layouts: what two ranks must know of a message's tensors beside their bytes, sent once and then by number."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LayoutBook", "TensorLayout", "describe", "flatten"]

_NUM_LAYOUTS = 128


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
        """Give room for the values: one dimension, as :func:`flatten` gives them."""
        return torch.empty(self.num_elements, dtype=self.dtype, device=device)

    def restore(self, flat: Tensor) -> Tensor:
        """Give the tensor whose values lie in ``flat``, without a copy."""
        return flat.as_strided(self.shape, self.strides)


def describe(tensor: Tensor) -> tuple[Tensor, TensorLayout]:
    """Give the tensor with memory that holds its values densely, copied only if it must be, and its layout.

    A permuted tensor keeps its order in memory (``channels_last``): kernels may add in another order for another
    one, and blocks on two ranks shall compute what they compute on one.
    """
    dense = tensor.detach().resolve_conj().resolve_neg()
    if not dense.is_contiguous() and torch.empty_like(dense, device="meta").stride() != dense.stride():
        dense = dense.contiguous()
    return dense, TensorLayout(tuple(dense.shape), dense.stride(), dense.dtype, dense.is_cuda)


def flatten(dense: Tensor) -> Tensor:
    """Give a dense tensor's values in the order of its memory, without a copy."""
    return dense.as_strided((dense.numel(),), (1,))


class LayoutBook:
    """Numbers for layouts, so that a layout that both sides know is sent as a number.

    Sender and receiver of a lane forget the oldest layout at the same message, hence stay in step without talking.
    """

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._layouts: OrderedDict[int, Any] = OrderedDict()
        self._next = 0

    def number(self, layout: bytes) -> tuple[int, bool]:
        """Give a layout's number, and whether the receiver does not know it yet."""
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
