"""Masks that a model makes only for batches with padding: found for every batch, so that boundaries have one form.

Attention without a mask is faster, so models of Hugging Face hand none to their layers where nothing is padded. What
they would have handed over tells a batch with more rows, which are padded: the masks of all rows but those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.row_trees import count_rows

__all__ = ["PADDINGS", "PaddedInputs", "arguments_by_name", "arguments_of", "find_masks", "with_padded_rows"]

PADDINGS = (0, 1)
"""What a mask may have where a place is padded; Hugging Face has 0."""


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the arguments and keyword arguments that an input of a model stands for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def arguments_by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the arguments of a call by name, those of ``**kwargs`` among them.

    Example:
        >>> arguments_by_name(lambda hidden, scale=1, **others: None, [3], {"mask": 5})
        {'hidden': 3, 'mask': 5}
    """
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs).arguments
    variable = [name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD and name in bound]
    inside = bound.pop(variable[0]) if variable else {}
    return {**bound, **inside}


def find_masks(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Give those inputs of a model that say which places of which row are padded: by name, one number per place."""
    tensors = {
        name: value
        for name, value in arguments_by_name(model.forward, args, kwargs).items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    num_rows = count_rows(tensors) if tensors else 0
    return [
        value
        for name, value in tensors.items()
        if name.endswith("mask") and value.dim() == 2 and len(value) == num_rows
    ]


class PaddedInputs(NamedTuple):
    """Arguments of a model with more rows.

    Attributes:
        args: Arguments.
        kwargs: Keyword arguments.
        num_rows: Rows that are the batch's.
        num_all: All rows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_rows: int
    num_all: int

    def of_batch(self, value: Tensor) -> Tensor:
        """Give the batch's rows of what the model made of all; what has no rows stays."""
        return value[: self.num_rows] if value.dim() > 0 and len(value) == self.num_all else value


def with_padded_rows(
    args: Sequence[Any], kwargs: Mapping[str, Any], masks: Sequence[Tensor], padding: int
) -> PaddedInputs:
    """Give a model's inputs with the first row again behind the others, its second half padded.

    Args:
        args: Arguments of a model.
        kwargs: Keyword arguments of a model.
        masks: Those of them that are masks, at least one.
        padding: What a mask has where a place is padded.
    """
    num_rows = len(masks[0])
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # As often as it takes for a number that nothing else has: tables of places must not look like rows.
    sizes = {size for tensor in tensors for size in tensor.shape}
    num_all = next(number for number in count(num_rows + 1) if number not in sizes)

    def lengthen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != num_rows:
            return leaf
        row = leaf[:1]
        if any(leaf is mask for mask in masks):
            row = row.clone()
            # Not one place: models that join places, of sound for example, would not notice.
            row[:, row.shape[1] // 2 :] = padding
        return torch.cat([leaf, *[row] * (num_all - num_rows)])

    longer_args, longer_kwargs = pytree.tree_map(lengthen, (tuple(args), dict(kwargs)))
    return PaddedInputs(longer_args, longer_kwargs, num_rows, num_all)
