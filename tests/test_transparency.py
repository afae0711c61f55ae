"""THE promise: the same module, the same data, the same seed give the same student, whatever the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import Run, assert_same_checkpoint, load, max_difference, train

pytestmark = pytest.mark.spawn

# Twenty optimizer steps with Adam, per-block clipping, accumulation over two batches and a schedule per step; 42 rows
# leave a short last batch of two rows.
TRAINER = {"max_steps": 20, "max_epochs": 20, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
Reference = Callable[[Run], dict[str, Any]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Train each module once in one process, under plain Lightning."""
    found: dict[str, dict[str, Any]] = {}

    def train_once(run: Run) -> dict[str, Any]:
        if repr(run) not in found:
            found[repr(run)] = train(run, tmp_path_factory.mktemp("reference") / "reference.ckpt")
        return found[repr(run)]

    return train_once


def _run(module: str, **changes: Any) -> Run:
    arguments: dict[str, Any] = {"module": module, "num_rows": 42, "trainer": TRAINER}
    return Run(**(arguments | changes))


@pytest.mark.parametrize(
    ("module", "plan", "num_ranks"),
    [
        pytest.param("conv", "0-1|2-4", 2, id="conv-2"),
        pytest.param("conv", "0|1-2|3-4", 3, id="conv-3"),
        pytest.param("conv", "0,4|1|2|3", 4, id="conv-not-contiguous-4"),
        pytest.param("dropout", "0-2|3", 2, id="dropout-2"),
        pytest.param("dropout", "0|1|2|3", 4, id="dropout-4"),
        pytest.param("transformer", "0-1|2-3", 2, id="transformer-2"),
        pytest.param("transformer", "0|1,T2|S2,3", 3, id="transformer-half-cut-3"),
        pytest.param("candidates", "0-2|3-6", 2, id="candidates-2"),
        pytest.param("candidates", "0,3,6|1,4|2,5", 3, id="candidates-not-contiguous-3"),
        pytest.param("conv", "T0-4|S0-4|-", 3, id="conv-teacher-alone-and-an-idle-rank"),
        pytest.param("dropout", "2-3|0-1", 2, id="dropout-loaded-by-another-rank-than-the-first"),
    ],
)
def test_whole_blocks_give_the_checkpoint_of_one_process_key_by_key_and_bit_by_bit(
    module: str, plan: str, num_ranks: int, reference: Reference, tmp_path: Path
) -> None:
    one = reference(_run(module, validate=True))
    many = train(_run(module, validate=True, plan=plan, num_ranks=num_ranks), tmp_path / "many.ckpt")
    assert_same_checkpoint(one, many)


@pytest.mark.parametrize(
    ("module", "plan", "num_ranks"),
    [
        pytest.param("linear", "joint", 3, id="joint-3"),
        pytest.param("linear", "0-1*2|2-3", 3, id="hybrid-2-1"),
        pytest.param("transformer-no-dropout", "0-1|2-3*2", 3, id="hybrid-1-2-transformer"),
        pytest.param("linear", "0,1:1/4|1:3/4,2-3", 2, id="fractional-border"),
        pytest.param("linear", "0,T1*2|S1,2:2/5|2:3/5,3", 4, id="all-families-4"),
        pytest.param("conv", "T0-1*2|S0-1,2-4", 3, id="split-teacher-half-cut"),
    ],
)
def test_split_rows_give_the_student_of_one_process_up_to_summation_order(
    module: str, plan: str, num_ranks: int, reference: Reference, tmp_path: Path
) -> None:
    one = reference(_run(module, double=True))
    many = train(_run(module, double=True, plan=plan, num_ranks=num_ranks), tmp_path / "many.ckpt")
    # Gradients are sums over rows; split, they are added in another order. In float64 that is 1e-16 a step.
    assert max_difference(one["state_dict"], many["state_dict"]) < 1e-12
    assert max_difference(one["optimizer_states"], many["optimizer_states"]) < 1e-12


def test_a_stream_without_a_length_and_with_validation_gives_the_same_student(
    reference: Reference, tmp_path: Path
) -> None:
    run = _run("conv", stream=True, shuffle=False, validate=True)
    many = train(replace(run, plan="0-1|2-4", num_ranks=2), tmp_path / "many.ckpt")
    assert_same_checkpoint(reference(run), many)


def test_bfloat16_mixed_precision_gives_the_same_student(reference: Reference, tmp_path: Path) -> None:
    run = _run("conv", trainer={**TRAINER, "precision": "bf16-mixed"})
    many = train(replace(run, plan="0-1|2-4", num_ranks=2), tmp_path / "many.ckpt")
    assert_same_checkpoint(reference(run), many)


def test_clipping_by_value_gives_the_same_student(reference: Reference, tmp_path: Path) -> None:
    run = _run("conv", trainer={**TRAINER, "gradient_clip_algorithm": "value", "gradient_clip_val": 0.01})
    many = train(replace(run, plan="0-1|2-4", num_ranks=2), tmp_path / "many.ckpt")
    assert_same_checkpoint(reference(run), many)


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param([("0-1|2-3", 2), ("0|1|2|3", 4)], id="2-to-4"),
        pytest.param([("0|1,T2|S2,3", 3), (None, 1)], id="3-to-plain-lightning"),
        pytest.param([(None, 1), ("0-2|3", 2), ("0|1-2|3", 3)], id="plain-lightning-to-2-to-3"),
    ],
)
def test_a_run_goes_on_under_any_other_plan_with_the_same_bits(
    legs: list[tuple[str | None, int]], reference: Reference, tmp_path: Path
) -> None:
    def leg(index: int, plan: str | None, num_ranks: int, resume: str | None) -> Run:
        trainer = {"max_epochs": 2 * (index + 1), "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
        return Run(module="dropout", shuffle=False, plan=plan, num_ranks=num_ranks, resume=resume, trainer=trainer)

    path: str | None = None
    expected: str | None = None
    for index, (plan, num_ranks) in enumerate(legs):
        train(leg(index, plan, num_ranks, path), tmp_path / f"{index}.ckpt")
        train(leg(index, None, 1, expected), tmp_path / f"expected{index}.ckpt")
        path, expected = str(tmp_path / f"{index}.ckpt"), str(tmp_path / f"expected{index}.ckpt")
    assert path is not None
    assert expected is not None
    assert_same_checkpoint(load(expected), load(path))


def test_a_run_goes_on_between_plans_that_split_rows(reference: Reference, tmp_path: Path) -> None:
    def leg(plan: str | None, num_ranks: int, epochs: int, resume: str | None) -> Run:
        trainer = {"max_epochs": epochs}
        return Run(
            module="linear", shuffle=False, double=True, plan=plan, num_ranks=num_ranks, resume=resume, trainer=trainer
        )

    one = train(leg(None, 1, 4, None), tmp_path / "one.ckpt")
    train(leg("0,1:1/4|1:3/4,2-3", 2, 2, None), tmp_path / "first.ckpt")
    many = train(leg("0-1*2|2-3", 3, 4, str(tmp_path / "first.ckpt")), tmp_path / "second.ckpt")
    assert max_difference(one["state_dict"], many["state_dict"]) < 1e-12


def test_a_batch_of_256_rows_over_three_ranks_trains_on_256_rows(reference: Reference, tmp_path: Path) -> None:
    run = _run("linear", num_rows=256, batch_size=256, double=True, trainer={"max_epochs": 3})
    many = train(replace(run, plan="joint", num_ranks=3), tmp_path / "many.ckpt")
    assert max_difference(reference(run)["state_dict"], many["state_dict"]) < 1e-12


def test_a_rank_may_get_no_row_of_a_batch(reference: Reference, tmp_path: Path) -> None:
    run = _run("linear", num_rows=5, batch_size=2, double=True, trainer={"max_epochs": 3})
    many = train(replace(run, plan="joint", num_ranks=4), tmp_path / "many.ckpt")
    assert max_difference(reference(run)["state_dict"], many["state_dict"]) < 1e-12
