from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.runtime.block_pairs import BlockPairs, pair_blocks
from lightning_pipebd.runtime.candidates import Candidate, Candidates, target_of
from lightning_pipebd.runtime.partition import PartitionError, call_block

X = torch.randn(3, 4)


def make_pairs(*candidates: nn.Module) -> BlockPairs:
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    student = nn.Sequential(nn.Linear(4, 4), Candidates(candidates), nn.Linear(4, 2))
    return pair_blocks(teacher, student, {str(index): str(index) for index in range(3)}, None, None)


def walk(pairs: BlockPairs) -> tuple[list[Any], list[Any]]:
    """Every block's boundary and what its student makes of it."""
    boundaries, outputs = [X], []
    for teacher, student in zip(pairs.teacher.blocks, pairs.student.blocks, strict=True):
        outputs.append(call_block(student, boundaries[-1]))
        boundaries.append(call_block(teacher, boundaries[-1]))
    return boundaries, outputs


class TestCandidatesModule:
    def test_the_chosen_one_runs(self) -> None:
        place = Candidates([nn.Identity(), nn.Tanh()], chosen=1)
        assert torch.equal(place(X), X.tanh())
        place.choose(0)
        assert torch.equal(place(X), X)

    @pytest.mark.parametrize("index", [-1, 2])
    def test_a_choice_that_does_not_exist_is_refused(self, index: int) -> None:
        with pytest.raises(ValueError, match=f"`chosen` must be a candidate's number below 2, but is {index}"):
            Candidates([nn.Identity(), nn.Tanh()], chosen=index)

    def test_no_candidates_are_refused(self) -> None:
        with pytest.raises(ValueError, match="`candidates` must have at least one module"):
            Candidates([])


class TestExpansion:
    def test_every_candidate_is_a_block_with_its_own_name_and_parameters(self) -> None:
        pairs = make_pairs(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False)), nn.Identity())
        assert pairs.names == ("0", "1[0]", "1[1]", "1[2]", "2")
        assert pairs.paths == (("0", "0"), ("1", "1[0]"), ("1", "1[1]"), ("1", "1[2]"), ("2", "2"))
        assert pairs.candidates == (None, *(Candidate("1", number, 3) for number in range(3)), None)
        assert pairs.student.parameter_names[1:4] == (
            ("1.candidates.0.weight", "1.candidates.0.bias"),
            ("1.candidates.1.0.weight",),
            (),
        )
        assert [len(names) for names in pairs.teacher.parameter_names] == [2, 2, 0, 0, 2]

    @pytest.mark.parametrize("num_candidates", [1, 2, 4])
    def test_all_candidates_read_one_boundary_and_imitate_the_next(self, num_candidates: int) -> None:
        layers = [nn.Linear(4, 4) for _ in range(num_candidates)]
        pairs = make_pairs(*layers)
        boundaries, outputs = walk(pairs)
        first, second = (
            model.get_submodule(path) for model, path in ((pairs.teacher_model, "0"), (pairs.teacher_model, "1"))
        )
        given = first(X)
        for number, layer in enumerate(layers):
            assert torch.equal(outputs[1 + number], layer(given))
            assert torch.equal(target_of(boundaries[2 + number]), second(given))
        assert torch.equal(boundaries[-1], pairs.teacher_model(X))

    def test_the_choice_stays_while_candidates_run(self) -> None:
        pairs = make_pairs(nn.Linear(4, 4), nn.Linear(4, 4))
        place = pairs.student_model.get_submodule("1")
        walk(pairs)
        assert place.chosen == 0

    def test_a_teacher_that_works_in_place_does_not_change_what_candidates_read(self) -> None:
        teacher = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
        student = nn.Sequential(nn.Linear(4, 4), Candidates([nn.Identity(), nn.Identity()]))
        pairs = pair_blocks(teacher, student, {"0": "0", "1": "1"}, None, None)
        _, outputs = walk(pairs)
        assert torch.equal(outputs[2], teacher[0](X))

    def test_a_boundary_that_is_a_tree_reaches_every_candidate(self) -> None:
        class Layer(nn.Module):
            def __init__(self, scale: float) -> None:
                super().__init__()
                self.scale = scale

            def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
                return hidden * mask * self.scale, mask

        teacher, student = nn.ModuleList([Layer(2.0)]), nn.ModuleList([Candidates([Layer(3.0), Layer(4.0)])])
        pairs = pair_blocks(teacher, student, None, list(teacher), list(student))
        boundary = (X, torch.full((3, 4), 0.5))
        fork = call_block(pairs.teacher.blocks[0], boundary)
        assert torch.equal(call_block(pairs.student.blocks[0], boundary)[0], X * 1.5)
        assert torch.equal(call_block(pairs.student.blocks[1], fork)[0], X * 2.0)
        assert torch.equal(target_of(fork)[0], X)
        assert torch.equal(call_block(pairs.teacher.blocks[1], fork)[0], X)

    def test_pairs_can_be_copied_and_pickled(self) -> None:
        pairs = make_pairs(nn.Linear(4, 4), nn.Linear(4, 4))
        _, outputs = walk(pairs)
        for other in (copy.deepcopy(pairs), pickle.loads(pickle.dumps(pairs))):
            assert torch.equal(walk(other)[1][2], outputs[2])
            parameters = {id(parameter) for parameter in other.student_model.parameters()}
            assert {id(parameter) for parameter in other.student.blocks[2].parameters()} <= parameters

    def test_shapes_of_candidates_are_checked(self) -> None:
        pairs = make_pairs(nn.Linear(4, 4), nn.Linear(4, 3))
        with pytest.raises(PartitionError, match=r"Boundary `1` -> `1\[1\]` must have one shape"):
            pairs.check_shapes(X, {})

    def test_the_name_of_a_place_means_all_its_candidates_each_with_an_adapter_of_its_own(self) -> None:
        pairs = make_pairs(nn.Linear(4, 4), nn.Linear(4, 4))
        assert pairs.resolve_keys({"1": "kl", "1[1]": "mse", 0: "mse"}, "block_losses") == {1: "kl", 2: "mse", 0: "mse"}
        adapters = pairs.resolve_keys({"1": nn.Linear(4, 4)}, "adapters")
        assert torch.equal(adapters[1].weight, adapters[2].weight)
        assert adapters[1].weight is not adapters[2].weight

    def test_parameters_beside_candidates_are_refused(self) -> None:
        student = nn.Sequential(nn.Linear(4, 4), Candidates([nn.Linear(4, 4), nn.Linear(4, 4)]))
        teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with pytest.raises(
            PartitionError, match=r"Block `1` must consist of its candidates alone.*has parameter 0\.weight"
        ):
            pair_blocks(teacher, student, {"1": "1"}, None, None)

    def test_two_places_in_one_block_are_refused(self) -> None:
        student = nn.Sequential(*(Candidates([nn.Identity(), nn.Identity()]) for _ in range(2)))
        teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with pytest.raises(PartitionError, match="has other candidates beside them"):
            pair_blocks(teacher, student, {"1": "1"}, None, None)
