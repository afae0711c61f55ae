"""What the user names is checked: paths on both sides of a block map, and parameters that two blocks would share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_pipebd.runtime.partition import PartitionError, check_block_map, check_ties, cut_model, explicit_blocks
from tests.helpers.containers import Container


def linear() -> nn.Linear:
    return nn.Linear(3, 3)


def chain() -> nn.Sequential:
    return nn.Sequential(linear(), linear(), linear())


@pytest.mark.parametrize(
    "block_map",
    [
        {"0": "1", "2": "2"},
        [("0", "1"), ("2", "2")],
        [["0", "1"], ["2", "2"]],
    ],
)
def test_a_block_map_is_a_mapping_or_pairs(block_map: Any) -> None:
    assert check_block_map(chain(), chain(), block_map) == (("0", "1"), ("2", "2"))


@pytest.mark.parametrize("block_map", ["layer1", ["layer1"], [("0", "1", "2")], {"0": 1}])
def test_a_block_map_of_another_kind_is_refused(block_map: Any) -> None:
    with pytest.raises(TypeError, match=r"`block_map` must map teacher paths to student paths.*Write"):
        check_block_map(chain(), chain(), block_map)


def test_an_empty_block_map_is_refused() -> None:
    with pytest.raises(PartitionError, match="`block_map` must have at least one pair"):
        check_block_map(chain(), chain(), {})


@pytest.mark.parametrize(
    ("block_map", "message"),
    [
        ([("9", "0")], "`9` must be the path of a module of the teacher"),
        ([("0", "9")], "`9` must be the path of a module of the student"),
        ([("0", "0"), ("0", "1")], "`0` of the teacher must end one block only"),
        ([("0", "1"), ("1", "1")], "`1` of the student must end one block only"),
    ],
)
def test_both_sides_of_a_block_map_are_checked(block_map: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        check_block_map(chain(), chain(), block_map)


def test_a_parameter_of_two_blocks_is_refused_with_both_its_names() -> None:
    model = chain()
    model[2].weight = model[0].weight
    partition = cut_model(model, ["0", "1", "2"])
    with pytest.raises(
        PartitionError,
        match=r"Parameter `0.weight` \(also named `2.weight`\) of the student must .* by blocks 0 and 2\. Merge",
    ):
        check_ties(model, partition, "student")


def test_a_parameter_that_opened_code_uses_in_two_blocks_is_refused() -> None:
    scale = {"scale": nn.Parameter(torch.ones(3))}
    model = Container(lambda self, x: self.a(x * self.scale) * self.scale, a=linear(), parameters=scale)
    partition = cut_model(model, ["a", ""])
    with pytest.raises(PartitionError, match=r"Parameter `scale` of the student .* by blocks 0 and 1"):
        check_ties(model, partition, "student")


def test_a_buffer_of_two_blocks_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), linear(), linear())
    partition = explicit_blocks(model, [model[:2], nn.Sequential(model[0], model[2])])
    with pytest.raises(PartitionError, match=r"Buffer `0.running_mean` of the student .* or give each its own buffer"):
        check_ties(model, partition, "student")


def test_a_parameter_that_a_block_shares_with_what_follows_the_last_boundary_is_no_tie() -> None:
    model = chain()
    model[2].weight = model[0].weight
    check_ties(model, cut_model(model, ["0", "1"]), "student")
