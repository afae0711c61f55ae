"""Structures of trees: plain ones are quickly told apart, and any tree comes back as it was."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch

from lightning_pipebd.runtime.layouts import describe, flatten, flatten_tree, restore_tree


class Pair(NamedTuple):
    """What torch takes for a container of its own kind."""

    first: Any
    second: Any


PLAIN: list[Any] = [
    torch.ones(2),
    None,
    (),
    [],
    {},
    ([1, (True, "a")], {"b": None, "a": [torch.ones(1)]}),
]
OTHERS: list[Any] = [1.5, Pair(1, 2), OrderedDict(a=1), {1: 2}, [torch.ones(1), {"x": (Pair(1, None),)}], [object]]


@pytest.mark.parametrize("tree", [*PLAIN, *OTHERS], ids=repr)
def test_a_tree_comes_back_with_its_types_and_its_order(tree: Any) -> None:
    leaves, structure, _ = flatten_tree(tree)
    assert repr(restore_tree(structure, leaves)) == repr(tree)


@pytest.mark.parametrize("tree", PLAIN, ids=repr)
def test_plain_structures_can_be_looked_up(tree: Any) -> None:
    _, structure, is_plain = flatten_tree(tree)
    assert is_plain
    assert {structure: 1}[flatten_tree(tree)[1]] == 1


@pytest.mark.parametrize("tree", OTHERS, ids=repr)
def test_what_could_be_mistaken_for_something_else_is_not_plain(tree: Any) -> None:
    assert not flatten_tree(tree)[2]


def test_structures_differ_where_containers_or_names_do() -> None:
    structures = [flatten_tree(tree)[1] for tree in ([1], (1,), {"a": 1}, {"b": 1}, [[1]], [1, 1], 1)]
    assert len(set(structures)) == len(structures)


WIDE = torch.arange(120.0).reshape(2, 5, 3, 4)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(WIDE, id="contiguous"),
        pytest.param(WIDE.permute(0, 3, 1, 2), id="permuted"),
        pytest.param(WIDE[:, 1:3], id="slice"),
        pytest.param(WIDE[:, 2:].permute(0, 3, 1, 2), id="permuted-slice"),
        pytest.param(WIDE[:, :, ::2], id="every-second"),
        pytest.param(WIDE[:1].expand(4, 5, 3, 4), id="expanded"),
        pytest.param(WIDE[:, :1, :, :2].expand(2, 6, 3, 2), id="expanded-slice"),
        pytest.param(torch.tensor(2.0).expand(3, 2), id="one-value"),
        pytest.param(WIDE[:, :0], id="empty"),
    ],
)
def test_a_tensor_comes_back_with_its_strides(tensor: torch.Tensor) -> None:
    dense, layout = describe(tensor)
    restored = layout.restore(flatten(dense).clone())
    assert torch.equal(restored, tensor)
    assert restored.stride() == tensor.stride() or not tensor.numel()


def test_values_that_share_memory_in_another_way_come_back_densely() -> None:
    windows = torch.arange(6.0).unfold(0, 3, 1)
    dense, layout = describe(windows)
    assert torch.equal(layout.restore(flatten(dense)), windows)
    assert layout.wanted is None
