from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.planning.buckets import BUCKET_BYTES
from lightning_pipebd.planning.program import Action, Kind, Program
from lightning_pipebd.runtime.gradients import BlockScaler, GradientReducer, clip_norm_over_ranks
from lightning_pipebd.runtime.local_transport import LocalWorld
from tests.helpers.ranks import RankError, run_threads


def make_parameters(*gradients: Tensor | None) -> list[nn.Parameter]:
    """Parameters of three entries in the gradients' types, float32 where there is none."""
    parameters = []
    for gradient in gradients:
        dtype = torch.float32 if gradient is None else gradient.dtype
        parameters.append(nn.Parameter(torch.zeros(3, dtype=dtype)))
        parameters[-1].grad = gradient
    return parameters


def program_of(blocks: Sequence[int], ranks: tuple[int, ...]) -> Program:
    """A program that only reduces."""
    return Program(ranks[0], 8, tuple(Action(Kind.REDUCE, block, ranks=ranks) for block in blocks))


def reduce_blocks(reducer: GradientReducer, blocks: Sequence[int], ranks: tuple[int, ...]) -> None:
    """Do what an executor does at the REDUCEs of a program, but for waiting."""
    reducer.begin(program_of(blocks, ranks))
    for block in blocks:
        reducer.start(block, ranks)


def reduce(make: Callable[[int], list[nn.Parameter]], num_ranks: int = 2) -> list[Any]:
    """Reduce one block over all ranks, and give each rank's gradients."""
    world = LocalWorld(num_ranks)

    def work(rank: int) -> list[Tensor | None]:
        parameters = make(rank)
        reducer = GradientReducer(world.transports[rank], {5: parameters})
        reduce_blocks(reducer, [5], tuple(range(num_ranks)))
        reducer.finish()
        return [parameter.grad for parameter in parameters]

    return run_threads(num_ranks, work)


class TestReducer:
    def test_ranks_that_have_all_gradients_do_not_ask_who_has_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # On a GPU the answer would be waited for.
        monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("the device is waited for"))
        seen = reduce(lambda rank: make_parameters(torch.ones(3), torch.ones(3)))
        assert all(torch.equal(gradient, torch.full((3,), 2.0)) for gradients in seen for gradient in gradients)

    def test_gradients_are_summed_over_the_ranks(self) -> None:
        seen = reduce(lambda rank: make_parameters(torch.full((3,), rank + 1.0), torch.full((3,), 10.0 * rank)), 3)
        assert [[gradient.tolist() for gradient in gradients] for gradients in seen] == [[[6.0] * 3, [30.0] * 3]] * 3

    def test_rank_without_rows_gets_the_gradients_of_the_others(self) -> None:
        seen = reduce(lambda rank: make_parameters(torch.ones(3) if rank == 0 else None))
        assert [gradients[0].tolist() for gradients in seen] == [[1.0] * 3] * 2

    def test_parameter_that_no_rank_has_a_gradient_for_keeps_none(self) -> None:
        seen = reduce(lambda rank: make_parameters(None, torch.ones(3)))
        assert [gradients[0] for gradients in seen] == [None, None]
        assert [gradients[1].tolist() for gradients in seen] == [[2.0] * 3] * 2

    def test_gradient_of_zeros_is_a_gradient(self) -> None:
        seen = reduce(lambda rank: make_parameters(torch.zeros(3) if rank == 0 else None))
        assert [gradients[0].tolist() for gradients in seen] == [[0.0] * 3] * 2

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
    def test_types_are_kept_apart(self, dtype: torch.dtype) -> None:
        seen = reduce(lambda rank: make_parameters(torch.ones(3, dtype=dtype), torch.full((3,), 0.1), None))
        for ours, theirs, none in seen:
            assert (ours.dtype, ours.tolist()) == (dtype, [2.0] * 3)
            assert torch.equal(theirs, torch.full((3,), 0.1) * 2)
            assert none is None

    def test_frozen_parameters_take_no_part(self) -> None:
        def make(rank: int) -> list[nn.Parameter]:
            parameters = make_parameters(torch.ones(3), torch.full((3,), 7.0))
            parameters[1].requires_grad_(False)
            return parameters

        assert [[gradient.tolist() for gradient in gradients] for gradients in reduce(make)] == [
            [[2.0] * 3, [7.0] * 3]
        ] * 2

    def test_parameters_that_no_optimizer_has_take_no_part(self) -> None:
        world = LocalWorld(2)

        def work(rank: int) -> list[Any]:
            parameters = make_parameters(torch.ones(3), torch.full((3,), 7.0))
            reducer = GradientReducer(world.transports[rank], {5: parameters})
            reducer.trained = lambda: frozenset({id(parameters[0])})
            for _ in range(2):
                reduce_blocks(reducer, [5], (0, 1))
                reducer.finish()
            return [parameter.grad.tolist() for parameter in parameters]

        assert run_threads(2, work) == [[[4.0] * 3, [7.0] * 3]] * 2

    def test_block_without_parameters_exchanges_nothing(self) -> None:
        reducer = GradientReducer(LocalWorld(2).transports[0], {5: []})
        reduce_blocks(reducer, [5], (0, 1))
        reducer.finish()

    def test_memory_formats_are_kept_and_values_stay_in_their_places(self) -> None:
        values = torch.arange(24.0).reshape(1, 2, 3, 4)

        def make(rank: int) -> list[nn.Parameter]:
            formatted = values.to(memory_format=torch.channels_last) if rank else values.clone()
            parameter = nn.Parameter(torch.zeros_like(formatted))
            parameter.grad = formatted.clone()
            return [parameter]

        (first,), (second,) = reduce(make)
        assert torch.equal(first, values * 2)
        assert torch.equal(second, values * 2)
        assert second.is_contiguous(memory_format=torch.channels_last)

    def test_gradient_tensors_are_the_same_objects_as_before(self) -> None:
        parameter = make_parameters(torch.ones(3))[0]
        gradient = parameter.grad
        reducer = GradientReducer(LocalWorld(1).transports[0], {0: [parameter]})
        reduce_blocks(reducer, [0], (0,))
        reducer.finish()
        assert parameter.grad is gradient

    def test_gradients_change_when_all_reductions_are_finished_and_not_before(self) -> None:
        world = LocalWorld(2)

        def work(rank: int) -> list[float]:
            blocks = {block: make_parameters(torch.full((3,), float(block))) for block in (1, 2)}
            reducer = GradientReducer(world.transports[rank], dict(blocks.items()))
            reduce_blocks(reducer, list(blocks), (0, 1))
            gradients = [parameters[0].grad for parameters in blocks.values()]
            before = [gradient[0].item() for gradient in gradients if gradient is not None]
            reducer.finish()
            reducer.finish()  # a second time finds nothing to do
            return before + [gradient[0].item() for gradient in gradients if gradient is not None]

        assert run_threads(2, work) == [[1.0, 2.0, 2.0, 4.0]] * 2

    def test_small_blocks_of_the_same_ranks_are_one_sum_and_large_ones_are_not_kept_back(self) -> None:
        world = LocalWorld(2)
        large = BUCKET_BYTES // 4  # float32

        def work(rank: int) -> list[Any]:
            sizes = {1: 3, 2: 5, 4: large, 5: 2, 6: 1}
            blocks = {block: [nn.Parameter(torch.zeros(size))] for block, size in sizes.items()}
            for (parameter,) in blocks.values():
                parameter.grad = torch.full_like(parameter, rank + 1.0)
            reducer = GradientReducer(world.transports[rank], blocks)
            reducer.begin(program_of(list(blocks), (0, 1)))
            under_way = []
            for block in blocks:
                reducer.start(block, (0, 1))
                under_way.append(world.transports[rank]._counts["all_reduce", (0, 1)])
            reducer.finish()
            sums = [parameter.grad.unique().tolist() for (parameter,) in blocks.values() if parameter.grad is not None]
            return [under_way, sums]

        assert run_threads(2, work) == [[[0, 0, 1, 1, 2], [[3.0]] * 5]] * 2

    def test_blocks_of_one_bucket_need_not_have_gradients_on_the_same_ranks(self) -> None:
        world = LocalWorld(2)

        def work(rank: int) -> list[Any]:
            # Each rank has rows of one of two blocks, and nobody has rows of the third.
            blocks = {block: make_parameters(torch.ones(3) if block == rank else None) for block in range(3)}
            reducer = GradientReducer(world.transports[rank], dict(blocks.items()))
            reduce_blocks(reducer, list(blocks), (0, 1))
            reducer.finish()
            gradients = [parameters[0].grad for parameters in blocks.values()]
            return [None if gradient is None else gradient.tolist() for gradient in gradients]

        assert run_threads(2, work) == [[[1.0] * 3, [1.0] * 3, None]] * 2

    def test_sparse_gradient_is_refused_by_the_name_of_its_block(self) -> None:
        parameter = nn.Parameter(torch.zeros(3, 2))
        parameter.grad = torch.zeros(3, 2).to_sparse()
        reducer = GradientReducer(LocalWorld(2).transports[0], {1: make_parameters(None), 2: [parameter]})
        with pytest.raises(ValueError, match=r"Student block 2, shared by ranks \(0, 1\), must have dense gradients"):
            reduce_blocks(reducer, [1, 2], (0, 1))

    def test_dead_rank_ends_the_wait(self) -> None:
        world = LocalWorld(2)

        def work(rank: int) -> None:
            if rank == 1:
                world.end(1)
                return
            reducer = GradientReducer(world.transports[0], {0: make_parameters(torch.ones(3))})
            reduce_blocks(reducer, [0], (0, 1))
            reducer.finish()

        with pytest.raises(RankError, match="TransportError: rank 0 lost rank 1"):
            run_threads(2, work)


def test_gradients_of_several_types_on_several_ranks_are_clipped_as_on_one() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32]

    def make() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        parameters = [nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in dtypes]
        for parameter in parameters[:4]:
            parameter.grad = torch.randn(4, generator=generator).to(parameter.dtype)
        return parameters

    expected = make()
    # Norms of several types are of the widest: so one process has them.
    present = [parameter.grad for parameter in expected if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([own.double() for own in torch._foreach_norm(present)]))
    nn.utils.clip_grads_with_norm_(expected, 0.5, norm)
    world = LocalWorld(2)

    def work(rank: int) -> Any:
        everyone = make()
        numbers = range(rank, len(everyone), 2)
        own = [everyone[number] for number in numbers]
        total = clip_norm_over_ranks(
            world.transports[rank], own, numbers, dtypes, max_norm=0.5, device=torch.device("cpu")
        )
        return total, {number: everyone[number].grad for number in numbers}

    found = run_threads(2, work)
    assert all(torch.equal(total, norm) for total, _ in found)
    for number, parameter in enumerate(expected):
        (gradient,) = (gradients[number] for _, gradients in found if number in gradients)
        assert gradient is None if parameter.grad is None else torch.equal(gradient, parameter.grad)


def make_scaler(parameters: list[nn.Parameter], **options: Any) -> BlockScaler:
    return BlockScaler(torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000, **options), parameters)


def backward(scaler: BlockScaler, parameter: nn.Parameter, factor: float) -> None:
    """Let autocast to float16 make the gradient, as mixed precision does."""
    with torch.autocast("cpu", dtype=torch.float16):
        output = parameter[None] @ torch.full((3, 1), factor)
    torch.autograd.backward(scaler.scale(output.float().sum()))


def unscale(scaler: BlockScaler) -> None:
    """Do as the ranks do after a step."""
    overflow = scaler.unscale()
    if overflow is not None and overflow:
        scaler.drop()


class TestScaler:
    def test_scaled_gradients_are_divided_by_the_scale(self) -> None:
        (parameter,) = make_parameters(None)
        scaler = make_scaler([parameter])
        backward(scaler, parameter, 0.5)
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [2.0] * 3
        unscale(scaler)
        assert parameter.grad.tolist() == [0.5] * 3

    def test_overflow_takes_the_gradients_of_its_block_alone(self) -> None:
        calm, wild = make_parameters(None, None)
        blocks = [(make_scaler([parameter]), parameter, factor) for parameter, factor in ((calm, 2.0), (wild, 3e4))]
        for scaler, parameter, factor in blocks:
            backward(scaler, parameter, factor)
            unscale(scaler)
        assert calm.grad is not None
        assert calm.grad.tolist() == [2.0] * 3
        assert wild.grad is None

    def test_overflow_lowers_the_scale_of_its_block_alone_until_it_fits(self) -> None:
        calm, wild = make_parameters(None, None)
        scalers = [make_scaler([calm]), make_scaler([wild])]
        for _ in range(2):
            backward(scalers[0], calm, 1.0)
            backward(scalers[1], wild, 3e4)
            for scaler in scalers:
                unscale(scaler)
        assert [scaler.scaler.get_scale() for scaler in scalers] == [4.0, 2.0]
        assert wild.grad is not None
        assert wild.grad.tolist() == [torch.tensor(3e4).half().item()] * 3

    def test_calm_steps_raise_the_scale(self) -> None:
        (parameter,) = make_parameters(None)
        scaler = BlockScaler(torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2), [parameter])
        scales = []
        for _ in range(4):
            backward(scaler, parameter, 1.0)
            unscale(scaler)
            scales.append(scaler.scaler.get_scale())
        assert scales == [4.0, 8.0, 8.0, 16.0]

    def test_state_carries_scale_and_growth_over(self) -> None:
        (parameter,) = make_parameters(None)
        first, second = (
            BlockScaler(torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2), [parameter]) for _ in range(2)
        )
        backward(first, parameter, 3e4)
        unscale(first)
        backward(first, parameter, 1.0)
        unscale(first)
        second.scaler.load_state_dict(first.scaler.state_dict())
        backward(second, parameter, 1.0)
        unscale(second)
        assert second.scaler.get_scale() == 4.0

    def test_without_gradients_nothing_happens(self) -> None:
        scaler = make_scaler(make_parameters(None))
        unscale(scaler)
        assert scaler.scaler.get_scale() == 4.0

    def test_parameter_without_gradient_beside_one_with_keeps_none(self) -> None:
        first, second = make_parameters(None, None)
        scaler = make_scaler([first, second])
        backward(scaler, first, 1.0)
        unscale(scaler)
        assert second.grad is None

    def test_rank_that_never_had_rows_unscales_what_the_others_reduced(self) -> None:
        (parameter,) = make_parameters(torch.full((3,), 8.0))
        scaler = make_scaler([parameter])
        unscale(scaler)
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [2.0] * 3

    def test_block_without_parameters_has_a_scaler_too(self) -> None:
        scaler = make_scaler([])
        assert scaler.scale(torch.ones(())).item() == 4.0
        unscale(scaler)
