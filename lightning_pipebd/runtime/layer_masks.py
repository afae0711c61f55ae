"""Masks that a model makes only for batches with padding: found for every batch, so that boundaries have one form.

Attention without a mask is faster, so models of Hugging Face hand none to their layers where nothing is padded. What
they would have handed over tells a batch with one more row, which is padded: the masks of all rows but the last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.row_trees import count_rows

__all__ = ["PADDINGS", "arguments_by_name", "arguments_of", "find_masks", "with_padded_row", "without_last_row"]

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


def with_padded_row(args: Sequence[Any], kwargs: Mapping[str, Any], masks: Sequence[Tensor], padding: int) -> Any:
    """Give arguments and keyword arguments with one more row, the first one again but padded at its first place.

    Args:
        args: Arguments of a model.
        kwargs: Keyword arguments of a model.
        masks: Those of them that are masks, at least one.
        padding: What a mask has where a place is padded.
    """

    def lengthen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != len(masks[0]):
            return leaf
        row = leaf[:1]
        if any(leaf is mask for mask in masks):
            row = row.clone()
            row[:, 0] = padding
        return torch.cat([leaf, row])

    return pytree.tree_map(lengthen, (tuple(args), dict(kwargs)))


def without_last_row(value: Tensor, num_rows: int) -> Tensor:
    """Give the first rows of what was found with one row more; what has no rows stays."""
    return value[:num_rows] if value.dim() > 0 and len(value) == num_rows + 1 else value
