"""NaN in one block: named, kept out of the block's state, and never noticed by the other blocks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.nonfinite import FiniteGuard, finite_flags, finite_flags_by_norm
from tests.helpers.ranks import RankError
from tests.helpers.resuming import states_of
from tests.helpers.scenarios import MakeTrainer, on_both, on_one_process, under_plan
from tests.helpers.toy import DropoutModule, LinearModule, make_loader
from tests.helpers.training import assert_same_checkpoint

BLOCK, STEP = 1, 4


def parameters(*gradients: float) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = torch.tensor([0.0, gradient])
    return made


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("loss", "statistic"), [(1.0, "gradient"), (float("nan"), "loss")])
def test_a_wrong_gradient_is_named(wrong: float, loss: float, statistic: str) -> None:
    guard = FiniteGuard("raise")
    guard.note_loss(3, torch.tensor(loss))
    with pytest.raises(FloatingPointError, match=rf"Block 3 \(fc\) .* but its {statistic} is not, at step 7"):
        guard.check(3, "fc", parameters(1.0, wrong, 2.0), [], 7)


@pytest.mark.parametrize("large", [1e38, -3e38])
def test_a_large_gradient_is_finite(large: float) -> None:
    guard = FiniteGuard("raise")
    guard.check(0, "fc", parameters(large, large), [], 0)
    assert guard.stopped == {}


def test_a_wrong_loss_of_any_accumulated_batch_is_remembered() -> None:
    guard = FiniteGuard("raise")
    for loss in (1.0, float("inf"), 1.0):
        guard.note_loss(0, torch.tensor(loss))
    with pytest.raises(FloatingPointError, match="its loss is not"):
        guard.check(0, "fc", parameters(float("nan")), [], 0)


def test_a_sparse_gradient_is_looked_at() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    guard = FiniteGuard("raise")
    guard.check(0, "embedding", list(embedding.parameters()), [], 0)
    embedding(torch.tensor([1])).mul(float("nan")).sum().backward()
    with pytest.raises(FloatingPointError):
        guard.check(0, "embedding", list(embedding.parameters()), [], 0)


TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WRONG = [float("nan"), float("inf"), -float("inf")]


def looked_at(dtype: torch.dtype, *elements: float) -> Tensor:
    """Give a gradient with these elements among small ones."""
    return torch.tensor([0.0, 1.0, *elements, -1.0], dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_few_kernels_find_what_is_not_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    gradients = [looked_at(dtype), looked_at(dtype, most, most, -most), *(looked_at(dtype, wrong) for wrong in WRONG)]
    gradients += [looked_at(dtype, float("inf"), float("nan")), looked_at(dtype, torch.finfo(dtype).tiny)]
    expected = [True, True, False, False, False, False, True]
    assert finite_flags_by_norm(gradients).tolist() == expected
    assert finite_flags(gradients).tolist() == expected


def test_the_flags_of_mixed_gradients_are_in_the_order_of_the_gradients() -> None:
    gradients = [looked_at(dtype, wrong) for wrong in (1.0, float("nan")) for dtype in TYPES]
    gradients.insert(1, torch.empty(0))
    gradients.insert(4, torch.tensor([1.0 + 2.0j, complex(0.0, float("inf"))]))
    gradients += [torch.tensor(own).to_sparse() for own in ([[0.0, float("nan")]], [[0.0, 1.0]], [[0.0, 0.0]])]
    gradients.append(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    gradients.append(torch.ones(()))
    expected = [True, True, True, True, False, True, False, False, False, False, False, True, True, True, True]
    assert finite_flags_by_norm(gradients).tolist() == expected
    assert finite_flags(gradients).tolist() == expected


def test_gradients_without_elements_are_finite() -> None:
    assert finite_flags_by_norm([torch.empty(0), torch.empty(3, 0)]).tolist() == [True, True]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_both_ways_to_look_lead_to_the_same(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setattr("lightning_pipebd.nonfinite.finite_flags", finite_flags_by_norm)
    guard, right, wrong = FiniteGuard(policy), parameters(3e38, 3e38), parameters(1.0, float("nan"))
    assert guard.check(0, "fc", right, [], 0)
    assert all(parameter.grad is not None for parameter in right)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"Block 0 \(fc\) .* but its gradient is not, at step 1"):
            guard.check(0, "fc", wrong, [], 1)
        return
    with pytest.warns(UserWarning, match="Its update is skipped"):
        assert not guard.check(0, "fc", wrong, [], 1)
    assert [parameter.grad for parameter in wrong] == [None, None]


def test_a_skipped_step_leaves_gradients_and_buffers_as_if_it_had_not_been() -> None:
    guard, buffer = FiniteGuard("skip"), torch.ones(2)
    guard.before_block(0, [buffer])
    buffer.fill_(float("nan"))
    wrong = parameters(float("nan"), 1.0)
    with pytest.warns(
        UserWarning, match=r"Block 0 \(fc\): its gradient is not finite at step 2. Its update is skipped"
    ):
        guard.check(0, "fc", wrong, [buffer], 2)
    assert [parameter.grad for parameter in wrong] == [None, None]
    assert buffer.tolist() == [1.0, 1.0]
    right = parameters(1.0)
    guard.check(0, "fc", right, [buffer], 3)
    assert right[0].grad is not None


def test_a_stopped_block_stays_stopped_also_after_a_checkpoint() -> None:
    guard = FiniteGuard("stop_block")
    with pytest.warns(UserWarning, match="It stays as it is from now on"):
        guard.check(0, "fc", parameters(float("nan")), [], 2)
    checkpoint: dict[str, Any] = {}
    guard.save(checkpoint, [guard.stopped, {3: 1}])
    resumed = FiniteGuard("stop_block")
    resumed.load(checkpoint)
    assert resumed.stopped == {0: 2, 3: 1}
    right = parameters(1.0)
    resumed.check(0, "fc", right, [], 3)
    assert right[0].grad is None
    going_on = FiniteGuard("skip")
    going_on.load(checkpoint)
    assert going_on.stopped == {}


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`on_nonfinite` must be one of 'raise', 'skip', 'stop_block', but is 'ignore'"
    ):
        FiniteGuard("ignore")


class Poisoned(DropoutModule):
    """One block's loss is not finite in one step."""

    def __init__(self, policy: str, block: int) -> None:
        super().__init__()
        self.finite_guard = FiniteGuard(policy)
        self.poisoned = block

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        loss = super().block_loss(block, student_output, teacher_output, targets)
        is_wrong = block == self.poisoned and self.trainer.global_step == STEP
        return loss * float("nan") if is_wrong else loss


def fit_poisoned(make_trainer: MakeTrainer, policy: str, block: int = BLOCK) -> dict[str, Any]:
    torch.manual_seed(11)
    module = Poisoned(policy, block)
    trainer = make_trainer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Block 1 .* is not finite at step 4")
        trainer.fit(module, make_loader(module, 40, 4, shuffle=True))
    return states_of(trainer, module)


@pytest.mark.spawn
def test_the_other_blocks_are_what_they_would_have_been_under_every_plan() -> None:
    both = on_both(fit_poisoned, ["skip", "stop_block"], plan="0|1-2|3", num_ranks=3)
    clean = on_one_process(fit_poisoned, "raise", -1)
    for policy, (one, ranks) in both.items():
        assert_same_checkpoint(one, ranks[0], policy)
        for name, value in clean["module"].items():
            is_of_block = name.startswith(f"student.features.{BLOCK}.")
            assert torch.isfinite(one["module"][name]).all(), name
            assert torch.equal(value, one["module"][name]) is not is_of_block or "num_batches" in name, (policy, name)
    skipped, stopped = both["skip"].one["module"], both["stop_block"].one["module"]
    weight = f"student.features.{BLOCK}.0.weight"
    assert not torch.equal(skipped[weight], stopped[weight])


class PoisonedLinear(LinearModule):
    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        loss = super().block_loss(block, student_output, teacher_output, targets)
        return loss * float("inf") if block == 2 and self.trainer.global_step == STEP else loss


def fit_linear(make_trainer: MakeTrainer) -> None:
    module = PoisonedLinear()
    make_trainer().fit(module, make_loader(module, 40, 4))


@pytest.mark.spawn
def test_by_default_the_run_ends_with_block_and_step(tmp_path: Path) -> None:
    expected = r"Block 2 \(2\) must have a finite gradient, but its loss is not, at step 4"
    with pytest.raises(RankError, match=expected) as caught:
        under_plan(fit_linear, plan="0-1|2-3")
    assert caught.value.rank == 1
    with pytest.raises(RankError, match=expected):
        on_one_process(fit_linear)


class RarelyPoisoned(LinearModule):
    """One block's loss is not finite in the last step of the first epoch, whose batch has one row."""

    def __init__(self) -> None:
        super().__init__()
        self.finite_guard = FiniteGuard("skip")

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        loss = super().block_loss(block, student_output, teacher_output, targets)
        return (
            loss * float("nan") if block == 2 and len(student_output) == 1 and not self.trainer.current_epoch else loss
        )


def fit_rarely_poisoned(make_trainer: MakeTrainer) -> dict[str, Any]:
    torch.manual_seed(11)
    module = RarelyPoisoned()
    trainer = make_trainer(max_epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Block 2 .* is not finite at step 2")
        trainer.fit(module, make_loader(module, 9, 4))
    return states_of(trainer, module)


@pytest.mark.spawn
def test_a_rank_without_rows_of_a_batch_judges_as_the_others_do() -> None:
    one = on_one_process(fit_rarely_poisoned)
    for states in under_plan(fit_rarely_poisoned, plan="joint"):
        torch.testing.assert_close(states["module"], one["module"], rtol=1e-4, atol=1e-5)
