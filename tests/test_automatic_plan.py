"""What is told of a plan's options before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_pipebd import PipeBDStrategy, PlanError
from lightning_pipebd.automatic_plan import UnreadLoader
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.measurement import Measurement
from tests.helpers.toy import make_loader, make_module
from tests.planning.cost_tables import constant_costs


def fit(strategy: PipeBDStrategy, name: str = "linear") -> None:
    module = make_module(name)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False, max_steps=1
    )
    trainer.fit(module, make_loader(module, 8, 4))


@pytest.mark.parametrize("level", ["statistics", "exact"])
def test_an_exactness_that_is_never_chosen_is_refused(level: str) -> None:
    with pytest.raises(ValueError, match=rf"`exactness` must be 'bitwise' or 'summation', but is '{level}'"):
        PipeBDStrategy(exactness=level)


def test_a_given_plan_says_itself_whether_it_teaches_ahead() -> None:
    with pytest.raises(ValueError, match="`teach_ahead` must be left out where `plan` is given"):
        PipeBDStrategy(plan="0-1|2-3", teach_ahead=True)


def test_a_memory_limit_must_be_bytes() -> None:
    with pytest.raises(ValueError, match="`memory_limit` must be bytes above 0, but is 'much'"):
        PipeBDStrategy(memory_limit="much")


def test_costs_must_be_a_file_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(CostError, match="`costs` must name a readable YAML or JSON file"):
        PipeBDStrategy(costs=str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("plan", "exactness", "name", "message"),
    [
        ("joint", "bitwise", "linear", r"`plan` must be bitwise.*block 0.*\(summation\)"),
        ("joint", "summation", "dropout", r"`plan` must be summation.*block 0 \(features\.0\).*\(statistics\)"),
    ],
)
def test_a_given_plan_that_is_not_exact_enough_is_refused(plan: str, exactness: str, name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fit(PipeBDStrategy(plan, exactness=exactness), name)


@pytest.mark.parametrize("is_alone", [True, False])
def test_costs_of_another_module_are_refused(is_alone: bool) -> None:
    costs = constant_costs([(1, 3)] * 3)
    given: Any = costs if is_alone else Measurement(costs=costs, num_rows=4)
    with pytest.raises(CostError, match="`costs` must describe the module's 4 blocks, but describe 3"):
        fit(PipeBDStrategy(costs=given))


def test_the_plan_is_unknown_before_it_was_found() -> None:
    strategy = PipeBDStrategy()
    assert strategy.outlook is None
    assert strategy.session is None


def test_an_unread_loader_tells_its_length_and_yields_nothing() -> None:
    loader = UnreadLoader([1, 2, 3])
    assert len(loader) == 3
    assert list(loader) == []
    with pytest.raises(TypeError):
        len(UnreadLoader(iter([])))
