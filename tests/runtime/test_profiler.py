"""The profiler: it finds the times that there are, and leaves no trace."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from math import pi
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.optimizer_costs import measure_updates
from lightning_pipebd.runtime.peak_memory import peak_bytes
from lightning_pipebd.runtime.profiler import BlockParts, BlockProfile, measured_row_counts, profile_blocks
from lightning_pipebd.runtime.sampling import Samples, uncertainty_ms
from lightning_pipebd.runtime.side_effects import preserved_random_states, untouched

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.ms = 0.0

    def __call__(self) -> float:
        return self.ms


class Busy:
    """Jobs that take a known time per row on a fake clock, half of it for gradients, and compute for real."""

    is_full = False

    def __init__(self, blocks: list[BlockParts], clock: Clock, *, noise: float = 0.0) -> None:
        self.blocks = blocks
        self.clock = clock
        self.noise = noise
        self.num_calls = 0
        self.taught: list[tuple[int, int]] = []
        self.put_off: list[Tensor] = []
        self.settle_ms = 0.0

    def teach(self, block: int, boundary: Any) -> Any:
        self.taught.append((block, len(boundary)))
        self._spend(1.0 * (block + 1) + 0.1 * len(boundary))
        with torch.no_grad():
            return self.blocks[block].teacher(boundary)

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        assert len(boundary) == len(target) == rows.num_rows == num_rows
        assert labels is None or len(labels) == num_rows
        self.put_off.append((self.blocks[block].student[0](boundary) - target).square().mean())
        self._spend(1.0 * (block + 1) + 0.25 * num_rows)
        self.settle_ms = 1.0 * (block + 1) + 0.25 * num_rows
        return self.put_off[0].detach()

    def settle(self) -> None:
        torch.autograd.backward(self.put_off)
        self.put_off = []
        self._spend(self.settle_ms)

    def _spend(self, ms: float) -> None:
        self.num_calls += 1
        self.clock.ms += ms * (1 + self.noise * (self.num_calls % 5 - 2) / 2)


def make_blocks(*, is_divisible: bool = True, draws: bool = True) -> list[BlockParts]:
    blocks = []
    for index in range(3):
        student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5 if draws else 0.0))
        blocks.append(
            BlockParts(
                name=f"block{index}",
                teacher=nn.Linear(4, 4).requires_grad_(False),
                student=(student,),
                parameters=tuple(student.parameters()),
                is_divisible=is_divisible,
            )
        )
    return blocks


def profile(blocks: list[BlockParts], **changes: Any) -> tuple[BlockProfile, Busy]:
    clock = Clock()
    jobs = Busy(blocks, clock, noise=changes.pop("noise", 0.0))
    arguments: dict[str, Any] = {"num_rows": 16, "row_counts": (8, 16), "own": (0, 1, 2), "device": CPU}
    samples = Samples(clock, **changes.pop("limits", {}))
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    found = profile_blocks(jobs, blocks, inputs, torch.arange(16), samples=samples, **arguments | changes)
    return found, jobs


def test_every_block_gets_the_times_that_it_takes() -> None:
    found, _ = profile(make_blocks())
    assert [costs.times.teach_ms.at(8) for costs in found.blocks.values()] == pytest.approx([1.8, 2.8, 3.8])
    assert [costs.times.teach_ms.at(16) for costs in found.blocks.values()] == pytest.approx([2.6, 3.6, 4.6])
    assert [costs.times.learn_ms.at(16) for costs in found.blocks.values()] == pytest.approx([10.0, 12.0, 14.0])
    assert found.noise == pytest.approx(0.0, abs=1e-9)
    assert found.boundary_bytes_per_row == (16, 16, 16, 16)


def test_only_the_own_blocks_are_measured() -> None:
    found, jobs = profile(make_blocks(), own=(1,))
    assert list(found.blocks) == [1]
    assert [block for block, _ in jobs.taught].count(2) == 2
    assert len(found.boundary_bytes_per_row) == 4


def test_a_block_that_must_stay_whole_is_learned_whole_only() -> None:
    found, _ = profile(make_blocks(is_divisible=False))
    assert found.blocks[0].times.learn_ms.amounts == (16.0,)
    assert found.blocks[0].times.teach_ms.amounts == (8.0, 16.0)


def test_measuring_ends_when_the_times_are_sure_or_the_budget_is_spent() -> None:
    sure, _ = profile(make_blocks())
    unsure, _ = profile(make_blocks(), noise=0.9, limits={"max_rounds": 12})
    hurried, _ = profile(make_blocks(), noise=0.9, limits={"budget_ms": 1.0})
    assert (sure.num_rounds, unsure.num_rounds, hurried.num_rounds) == (4, 12, 4)
    assert unsure.noise > 0.02
    assert sure.jitter_ms == pytest.approx(0.0, abs=1e-9)
    assert unsure.jitter_ms > 0.1


def test_sizes_are_those_of_the_tensors() -> None:
    sizes = profile(make_blocks())[0].blocks[0].sizes
    parameters = (4 * 4 + 4 + 4 + 4) * 4
    assert sizes.teacher_parameter_bytes == (4 * 4 + 4) * 4
    assert (sizes.gradient_bytes, sizes.student_parameter_bytes) == (parameters, parameters + 4 * 4 * 2 + 8)
    # Normalised, dropped, the difference: at least three tensors like the boundary.
    assert 3 * 16 <= sizes.learn_bytes_per_row <= 20 * 16


def test_nothing_has_changed_afterwards() -> None:
    blocks = make_blocks()
    modules = [module for parts in blocks for module in (parts.teacher, *parts.student)]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    blocks[0].parameters[0].grad = kept = torch.ones(4, 4)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    profile(blocks)
    for module, values in zip(modules, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    assert blocks[0].parameters[0].grad is kept
    assert torch.equal(kept, torch.ones(4, 4))
    assert all(parameter.grad is None for parameter in blocks[1].parameters)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


class Mixing(nn.Module):
    """A teacher block whose output has as many columns as the batch has rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.T


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 16:
            raise RuntimeError("too few rows")
        return x


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [(Mixing(), "must give one entry per row"), (Picky(), "block0, given 8 rows: too few rows")],
)
def test_a_teacher_that_cannot_be_divided_is_noticed(teacher: nn.Module, reason: str) -> None:
    blocks = make_blocks()[:1]
    student = nn.Linear(4, 16 if isinstance(teacher, Mixing) else 4)
    blocks[0] = BlockParts(name="block0", teacher=teacher, student=(student,), parameters=tuple(student.parameters()))
    found, _ = profile(blocks, own=(0,))
    assert reason in found.whole_reason
    assert found.blocks[0].times.learn_ms.amounts == (16.0,)


class Pairs(Busy):
    """Losses over pairs of rows, sums, or the ordinary mean, block by block."""

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        if block == 2 and num_rows < 16:
            raise RuntimeError("needs the whole batch")
        loss = super().learn(block, boundary, target, labels, rows, num_rows)
        return [loss * num_rows, loss, loss][block]


def test_losses_that_are_no_mean_over_rows_are_noticed() -> None:
    blocks = make_blocks()
    for index, parts in enumerate(blocks):
        student = nn.Linear(4, 4)
        blocks[index] = replace(parts, student=(student,), parameters=tuple(student.parameters()))
    clock = Clock()
    found = profile_blocks(
        Pairs(blocks, clock),
        blocks,
        torch.randn(16, 4),
        torch.arange(16),
        num_rows=16,
        row_counts=(8, 16),
        own=(0, 1, 2),
        device=CPU,
        samples=Samples(clock),
    )
    assert found.coupled == {0, 2}
    assert [found.blocks[block].times.learn_ms.amounts for block in range(3)] == [(16.0,), (8.0, 16.0), (16.0,)]


@pytest.mark.parametrize(
    ("num_rows", "num_ranks", "expected"),
    [(64, 1, (64,)), (64, 2, (32, 64)), (10, 4, (3, 4, 5, 10)), (256, 16, (16, 41, 128, 256)), (2, 8, (1, 2))],
)
def test_row_counts_lie_between_a_rank_s_part_and_the_batch(
    num_rows: int, num_ranks: int, expected: tuple[int, ...]
) -> None:
    counts = measured_row_counts(num_rows, num_ranks)
    assert counts[-1] == num_rows
    assert counts[0] == -(-num_rows // num_ranks)
    assert len(counts) == len(expected)


def rounds_of(*rounds_ms: tuple[float, ...]) -> Samples:
    samples = Samples(Clock())
    for times in rounds_ms:
        for block, ms in enumerate(times):
            samples.values["learn", block, 8].append(ms)
    return samples


def test_jitter_is_the_variance_of_rounds_by_their_time() -> None:
    rng = random.Random(0)
    rounds = [(rng.gauss(60, 3), rng.gauss(40, 4)) for _ in range(2000)]
    assert rounds_of(*rounds).jitter_ms() == pytest.approx(25 / 100, rel=0.1)


def test_slow_change_is_no_jitter_and_one_long_disturbance_is_not_all_of_it() -> None:
    drifting = [(100 + round_ / 10,) for round_ in range(100)]
    assert rounds_of(*drifting).jitter_ms() < 1e-4
    # The square of 200 ms in one round of 101 would be a variance of 400; ranks wait that long once, 4 ms in the mean.
    assert rounds_of(*[(100,)] * 50, (300,), *[(100,)] * 50).jitter_ms() == pytest.approx(pi * 2**2 / 102, rel=0.02)


def test_jitter_is_that_of_a_rank_s_part_of_the_rows() -> None:
    samples = rounds_of((10,), (14,), (10,))
    samples.values["learn", 0, 16] += [40, 80, 10]
    assert samples.jitter_ms() == rounds_of((10,), (14,), (10,)).jitter_ms() > 0


@pytest.mark.parametrize("rounds", [[], [(5.0,)], [(0.0,), (0.0,)]])
def test_without_two_rounds_that_take_time_there_is_no_jitter(rounds: list[tuple[float, ...]]) -> None:
    assert rounds_of(*rounds).jitter_ms() == 0.0


def test_uncertainty_shrinks_with_the_number_of_measurements() -> None:
    few, many = [1.0, 2.0, 3.0], [1.0, 2.0, 3.0] * 20
    assert uncertainty_ms(many) < uncertainty_ms(few) / 2


class Stateful(nn.Module):
    """Changes everything that a module can change of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.replaced: Tensor
        self.register_buffer("replaced", torch.zeros(2))
        self.count = 0
        self.history: list[int] = []
        self.recent: deque[int] = deque(maxlen=2)
        self.total = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(2)
            self.mean += 1
        self.replaced = self.replaced + 1
        self.count += 1
        self.history.append(1)
        self.recent.append(1)
        self.total += 1
        self.new = 1
        return x * self.weight


def test_untouched_puts_back_whatever_a_module_changes_of_itself() -> None:
    module, outer = Stateful(), nn.Sequential()
    replaced = module.replaced
    outer.append(module)
    with untouched([outer]):
        outer(torch.ones(2)).sum().backward()
        assert module.count == 1
    assert module.weight.tolist() == [1, 1]
    assert module.weight.grad is None
    assert (module.mean.tolist(), module.replaced.tolist()) == ([0, 0], [0, 0])
    assert module.replaced is replaced
    assert (module.count, module.history, list(module.recent), module.total.item()) == (0, [], [], 0)
    assert not hasattr(module, "new")


def test_random_states_go_on_as_if_nothing_was_drawn() -> None:
    with preserved_random_states():
        first = torch.rand(1), random.random(), np.random.rand()
    assert (torch.rand(1), random.random(), np.random.rand()) == first


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_measuring_updates_changes_neither_parameters_nor_optimizer(make: Any) -> None:
    first, second = nn.Linear(8, 8), nn.Linear(2, 2)
    optimizer = make([{"params": first.parameters()}, {"params": second.parameters(), "weight_decay": 0.1}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = [parameter.clone() for parameter in (*first.parameters(), *second.parameters())]
    found = measure_updates([optimizer], [list(first.parameters()), list(second.parameters())], CPU)
    assert all(
        torch.equal(new, old) for new, old in zip((*first.parameters(), *second.parameters()), before, strict=True)
    )
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"] == list(first.parameters())
    assert len(found.update_ms) == 2
    if make is torch.optim.SGD:
        assert found.optimizer_bytes == (0, 0)
    else:
        assert found.optimizer_bytes == (2 * 72 * 4 + 2 * 4, 2 * 6 * 4 + 2 * 4)
    optimizer.step()
    scheduler.step()


class Counting(torch.optim.SGD):
    num_steps = [0]  # noqa: RUF012 - shared with every copy, as a wrapped optimizer would be

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.num_steps[0] += 1


def test_an_optimizer_of_the_user_s_is_never_stepped() -> None:
    layer = nn.Linear(2, 2)
    found = measure_updates([Counting(layer.parameters(), lr=1.0)], [list(layer.parameters())], CPU)
    assert Counting.num_steps == [0]
    assert found.optimizer_bytes[0] > 0


def test_peak_memory_is_what_lives_at_one_time() -> None:
    def work() -> None:
        for _ in range(5):
            torch.ones(1000)

    def hoard() -> list[Tensor]:
        return [torch.ones(1000) for _ in range(5)]

    assert 4000 <= peak_bytes(work, CPU) <= 8000
    assert peak_bytes(hoard, CPU) == 20000
