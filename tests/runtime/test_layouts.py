"""Structures of trees: plain ones are quickly told apart, and any tree comes back as it was."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch

from lightning_pipebd.runtime.layouts import flatten_tree, keep_gradient_layouts, restore_tree, without_gaps


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


def test_slices_lose_their_gaps_and_permuted_tensors_keep_their_order() -> None:
    whole = torch.randn(2, 6, 4, 4)
    last = whole.to(memory_format=torch.channels_last)
    given = {"slice": whole[:, :3], "same": [whole, 1], "last": last, "wide": whole[:, :1].expand(2, 6, 4, 4)}
    found = without_gaps(given)
    assert found["same"][0] is whole
    assert found["last"] is last
    assert found["slice"].stride() == (48, 16, 4, 1)
    assert found["wide"].is_contiguous()
    assert all(torch.equal(found[name], given[name]) for name in ("slice", "wide"))


def test_a_tree_without_gaps_is_given_back_itself() -> None:
    tree = {"a": [torch.ones(2)], "b": None}
    assert without_gaps(tree) is tree


def test_what_is_not_laid_out_by_strides_is_left_alone() -> None:
    sparse = torch.eye(3).to_sparse()
    assert without_gaps(sparse) is sparse


def test_gradients_come_in_the_order_of_their_tensor_as_at_a_leaf() -> None:
    seen = []
    inputs = torch.randn(2, 3, 4, 4, requires_grad=True)
    hidden = (inputs * 2).to(memory_format=torch.channels_last)
    hidden.register_hook(lambda gradient: seen.append(gradient.stride()))
    keep_gradient_layouts((hidden, 1))
    hidden.register_hook(lambda gradient: seen.append(gradient.stride()))
    hidden.sum((2, 3)).square().sum().backward()
    assert seen == [(3, 1, 0, 0), hidden.stride()]
    assert inputs.grad is not None
    assert torch.equal(inputs.grad[0, 0], inputs.grad[0, 0, 0, 0].expand(4, 4))
