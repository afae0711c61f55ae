"""State spread over ranks makes up the checkpoint of one device, and comes back from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils import _pytree as pytree

from lightning_pipebd.checkpoint import PrunedOptimizer, hand_over, synchronise
from lightning_pipebd.runtime.local_transport import LocalTransport, LocalWorld
from lightning_pipebd.runtime.transport import Transport
from tests.helpers.ranks import RankError, run_threads

#: Per layer, the ranks that update it, the one whose state counts first.
THREE_RANKS = ((0,), (1,), (2, 1), (2,))
OTHER_THREE_RANKS = ((2,), (0, 1), (0,), (0,))
RANK_0_IDLE = ((1,), (1,), (1,), (1,))

MakeOptimizer = Callable[[nn.Module], Optimizer]


def two_groups(model: nn.Module) -> Optimizer:
    """Weights with decay, biases without, and the last layer at a rate of its own: most ranks lack a group."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": parameters[0:6:2], "weight_decay": 0.1},
        {"params": parameters[1:6:2]},
        {"params": parameters[6:], "lr": 0.5},
    ]
    return AdamW(groups, lr=0.1)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "Adam": lambda model: Adam(model.parameters(), lr=0.1),
    "Adam with amsgrad, backwards": lambda model: Adam(list(model.parameters())[::-1], lr=0.1, amsgrad=True),
    "Adam with names": lambda model: Adam(list(model.named_parameters()), lr=0.1),
    "SGD": lambda model: SGD(model.parameters(), lr=0.1),
    "SGD with momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad, which has state from the start": lambda model: Adagrad(model.parameters(), lr=0.1),
    "RMSprop": lambda model: RMSprop(model.parameters(), lr=0.1, momentum=0.5, centered=True),
    "groups": two_groups,
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2, 3 if index % 2 else 2) for index in range(4)))


def values_of(tree: Any) -> Any:
    """The tree with every tensor as (dtype, values), which `==` compares."""
    return pytree.tree_map_only(Tensor, lambda leaf: (leaf.dtype, leaf.tolist()), tree)


def step(model: nn.Module, optimizer: Optimizer, num_steps: int) -> None:
    """Update the parameters that the optimizer has, each by gradients of its own."""
    local = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for index in range(num_steps):
        for number, parameter in enumerate(model.parameters()):
            gradient = torch.arange(1.0, 1 + parameter.numel()).reshape(parameter.shape) * (number - 2.5) / (index + 1)
            parameter.grad = gradient if id(parameter) in local else None
        optimizer.step()


class Ranks:
    """Every rank's model and pruned optimizer."""

    def __init__(self, make_optimizer: MakeOptimizer, layers: Sequence[tuple[int, ...]]) -> None:
        self.world = LocalWorld(3)
        self.models = [make_model() for _ in range(3)]
        self.pruned = [self._prune(rank, make_optimizer, layers) for rank in range(3)]

    def _prune(self, rank: int, make_optimizer: MakeOptimizer, layers: Sequence[tuple[int, ...]]) -> PrunedOptimizer:
        model = self.models[rank]
        ranks = {id(parameter): layers[index // 2] for index, parameter in enumerate(model.parameters())}
        return PrunedOptimizer(
            make_optimizer(model),
            is_local=lambda parameter: rank in ranks[id(parameter)],
            is_owned=lambda parameter: rank == ranks[id(parameter)][0],
        )

    def step(self, num_steps: int) -> None:
        for model, pruned in zip(self.models, self.pruned, strict=True):
            step(model, pruned.optimizer, num_steps)

    def state(self) -> dict[str, Any]:
        states = run_threads(3, lambda rank: self.pruned[rank].state(self.world.transports[rank]))
        merged: dict[str, Any] = states[0]
        return merged

    def load(self, state: dict[str, Any]) -> None:
        for pruned in self.pruned:
            # As from a file: an optimizer goes on in the very tensors that it loads.
            pruned.load(copy.deepcopy(state))


@pytest.mark.parametrize("layers", [THREE_RANKS, OTHER_THREE_RANKS, RANK_0_IDLE], ids=["one", "other", "rank 0 idle"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
class TestPrunedOptimizer:
    @pytest.mark.parametrize("num_steps", [0, 2])
    def test_state_of_all_ranks_is_that_of_one_device(
        self, make_optimizer: MakeOptimizer, layers: Sequence[tuple[int, ...]], num_steps: int
    ) -> None:
        model = make_model()
        optimizer, ranks = make_optimizer(model), Ranks(make_optimizer, layers)
        step(model, optimizer, num_steps)
        ranks.step(num_steps)
        state = ranks.state()
        assert values_of(state) == values_of(optimizer.state_dict())
        assert list(state["state"]) == list(optimizer.state_dict()["state"])

    def test_state_of_one_device_goes_on_under_any_plan(
        self, make_optimizer: MakeOptimizer, layers: Sequence[tuple[int, ...]]
    ) -> None:
        model = make_model()
        optimizer, ranks = make_optimizer(model), Ranks(make_optimizer, layers)
        step(model, optimizer, 3)
        ranks.load(optimizer.state_dict())
        for copied in ranks.models:
            copied.load_state_dict(model.state_dict())
        step(model, optimizer, 2)
        ranks.step(2)
        assert values_of(ranks.state()) == values_of(optimizer.state_dict())
        for index, (name, parameter) in enumerate(model.named_parameters()):
            for rank in layers[index // 2]:
                assert torch.equal(ranks.models[rank].get_parameter(name), parameter)

    def test_state_of_one_device_loads_back_into_one_device(
        self, make_optimizer: MakeOptimizer, layers: Sequence[tuple[int, ...]]
    ) -> None:
        ranks = Ranks(make_optimizer, layers)
        ranks.step(2)
        state = ranks.state()
        optimizer = make_optimizer(make_model())
        optimizer.load_state_dict(copy.deepcopy(state))
        assert values_of(optimizer.state_dict()) == values_of(state)


class TestPruning:
    def test_nothing_is_kept_of_other_ranks_parameters(self) -> None:
        ranks = Ranks(OPTIMIZERS["Adagrad, which has state from the start"], THREE_RANKS)
        assert [len(pruned.optimizer.state) for pruned in ranks.pruned] == [2, 4, 4]
        assert [len(pruned.optimizer.param_groups[0]["params"]) for pruned in ranks.pruned] == [2, 4, 4]

    def test_state_of_a_shared_layer_is_its_owners(self) -> None:
        ranks = Ranks(OPTIMIZERS["SGD with momentum"], ((0,), (1,), (1, 2), (2,)))
        ranks.step(1)
        shared = ranks.models[2].get_parameter("2.weight")
        ranks.pruned[2].optimizer.state[shared]["momentum_buffer"].zero_()
        assert ranks.state()["state"][4]["momentum_buffer"].count_nonzero() == 4

    def test_empty_groups_keep_their_numbers_and_their_rates(self) -> None:
        ranks = Ranks(two_groups, THREE_RANKS)
        optimizer = ranks.pruned[0].optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 2.0, lambda _: 3.0])
        ranks.step(1)
        scheduler.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 0]
        assert [group["lr"] for group in ranks.state()["param_groups"]] == [0.1, 0.2, 1.5]

    def test_parameters_are_untouched_by_ranks_that_do_not_update_them(self) -> None:
        ranks = Ranks(OPTIMIZERS["Adam"], THREE_RANKS)
        ranks.step(2)
        fresh = dict(make_model().named_parameters())
        changed = [
            {int(name[0]) for name, parameter in model.named_parameters() if not torch.equal(parameter, fresh[name])}
            for model in ranks.models
        ]
        assert changed == [{0}, {1, 2}, {2, 3}]

    def test_state_with_other_groups_is_refused(self) -> None:
        pruned = Ranks(OPTIMIZERS["Adam"], THREE_RANKS).pruned[0]
        state = two_groups(make_model()).state_dict()
        with pytest.raises(
            ValueError, match=r"`optimizer_states` must have parameter groups of \[8\] parameters, .* has \[3, 3, 2\]"
        ):
            pruned.load(state)


def make_tensors(rank: int) -> list[Tensor]:
    """Tensors of every kind that models have, holding the rank's number."""
    image = torch.full((1, 2, 3, 4), float(rank)).to(memory_format=torch.channels_last)
    shapes = [torch.full((), rank), torch.full((2, 3), rank).t(), torch.zeros(0)]
    types = [torch.full((3,), rank).to(dtype) for dtype in (torch.bool, torch.int16, torch.complex64, torch.bfloat16)]
    return [nn.Parameter(torch.full((2, 2), float(rank))), nn.Parameter(image), *shapes, *types]


def on_ranks(function: Callable[[Transport, list[Tensor]], Any], tensors: list[list[Tensor]]) -> list[Any]:
    world = LocalWorld(len(tensors))
    return run_threads(len(tensors), lambda rank: function(world.transports[rank], tensors[rank]))


class TestHandOver:
    def test_every_group_of_tensors_is_its_owners_on_every_rank(self) -> None:
        everyone = [[*make_tensors(rank), *make_tensors(rank)] for rank in range(3)]
        half = len(everyone[0]) // 2
        on_ranks(
            lambda transport, tensors: hand_over(transport, [(tensors[:half], 2), ([], 0), (tensors[half:], 1)]),
            everyone,
        )
        assert [values_of(tensors) for tensors in everyone] == [values_of([*make_tensors(2), *make_tensors(1)])] * 3

    def test_tensors_stay_the_same_objects_in_the_same_memory_layout(self) -> None:
        everyone = [make_tensors(rank) for rank in range(2)]
        before = [(tensor.data_ptr(), tensor.stride()) for tensor in everyone[1]]
        on_ranks(lambda transport, tensors: hand_over(transport, [(tensors, 0)]), everyone)
        assert [(tensor.data_ptr(), tensor.stride()) for tensor in everyone[1]] == before
        assert everyone[1][0].requires_grad

    def test_what_is_overwritten_is_not_read(self) -> None:
        # Tensors without values could not be.
        tensors = [make_tensors(0), [tensor.to("meta") for tensor in make_tensors(1)]]
        on_ranks(lambda transport, own: hand_over(transport, [(own, 0)]), tensors)
        assert values_of(tensors[0]) == values_of(make_tensors(0))

    def test_one_rank_has_nobody_to_tell(self) -> None:
        transport = LocalWorld(1).transports[0]
        hand_over(transport, [([torch.zeros(2, device="meta")], 0)])


def named(tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"tensor.{index}", tensor) for index, tensor in enumerate(tensors)]


def synchronise_all(tensors: list[list[Tensor]]) -> list[list[str]]:
    return on_ranks(lambda transport, mine: synchronise(transport, named(mine)), tensors)


class TestSynchronise:
    def test_equal_tensors_are_not_exchanged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(transport: LocalTransport, tensor: Tensor, source: int) -> None:
            raise AssertionError("nothing differs")

        monkeypatch.setattr(LocalTransport, "broadcast", refuse)
        everyone = [[*make_tensors(7), torch.tensor([float("nan"), -0.0])] for _ in range(3)]
        assert synchronise_all(everyone) == [[]] * 3

    def test_tensors_that_differ_on_any_rank_become_those_of_rank_0(self) -> None:
        everyone = [make_tensors(7) for _ in range(3)]
        everyone[2][1].data[0, 1, 2, 3] += 1
        everyone[1][5][0] = False
        assert synchronise_all(everyone) == [["tensor.1", "tensor.5"]] * 3
        assert [values_of(tensors) for tensors in everyone] == [values_of(make_tensors(7))] * 3

    def test_two_elements_that_changed_places_are_seen_anywhere(self) -> None:
        first = torch.arange(10_000.0)
        second = first.clone()
        second[[9_000, 9_001]] = second[[9_001, 9_000]]
        assert synchronise_all([[first], [second]]) == [["tensor.0"]] * 2
        assert second.equal(torch.arange(10_000.0))

    @pytest.mark.parametrize(
        "other", [[torch.zeros(2), torch.zeros(4)], [torch.zeros(2), torch.zeros(3).double()], [torch.zeros(2)]]
    )
    def test_models_of_other_shapes_types_or_names_are_an_error_on_every_rank(self, other: list[Tensor]) -> None:
        everyone = [[torch.zeros(2), torch.zeros(3)], other]

        def refuse(transport: Transport, tensors: list[Tensor]) -> None:
            with pytest.raises(RuntimeError, match=r"every rank must build the same models, but rank 1 .*tensor\.1"):
                synchronise(transport, named(tensors))

        on_ranks(refuse, everyone)

    def test_dead_rank_is_an_error(self) -> None:
        world = LocalWorld(2)
        world.end(1)
        with pytest.raises(RankError, match="TransportError: rank 0 lost rank 1"):
            run_threads(1, lambda rank: synchronise(world.transports[rank], named([torch.zeros(1)])))


def test_groups_that_are_added_during_a_fit_are_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
    pruned = PrunedOptimizer(optimizer, is_local=lambda _: True, is_owned=lambda _: True)
    with pytest.raises(RuntimeError, match="`add_param_group` must not be called during a fit"):
        optimizer.add_param_group({"params": list(model.parameters())[2:]})
    pruned.restore()
    optimizer.add_param_group({"params": list(model.parameters())[2:]})
    assert len(optimizer.param_groups) == 2
