"""Without a plan: the blocks are measured, a plan is found and used, and nothing of that is seen in the student."""

from __future__ import annotations

import json
import random
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, Plan, Timeline, format_plan, parse_plan
from lightning_pipebd.planning.measurement import Measurement
from tests.helpers.hearing import heard
from tests.helpers.ranks import RankError
from tests.helpers.scenarios import Both, MakeTrainer, on_both, under_plan
from tests.helpers.toy import ToyData, ToyStream
from tests.helpers.training import assert_same_checkpoint, load
from tests.planning.cost_tables import constant_costs

pytestmark = pytest.mark.spawn

SHAPE = (6,)


class Slow(nn.Module):
    """Takes its time, so that two ranks are worth it."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.ms / 1000)
        return x


class SlowModule(BlockwiseDistillationModule):
    """Three blocks with BatchNorm, dropout, a counter, and an optimizer that asks how long it will train."""

    def __init__(self, slowness: float = 1.0) -> None:
        def block(ms: float, *layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(Slow(slowness * ms), nn.Linear(6, 6), nn.BatchNorm1d(6), *layers)

        torch.manual_seed(7)
        teacher = nn.Sequential(*(block(2.0) for _ in range(3)))
        student = nn.Sequential(block(8.0, nn.Dropout(0.2)), block(4.0, nn.Dropout(0.2)), block(4.0))
        super().__init__(teacher, student, {str(index): str(index) for index in range(3)})
        self.num_losses = 0

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        self.num_losses += 1
        self.log("last", student_output.mean())
        noise = torch.rand(()) * random.random()
        return super().block_loss(block, student_output, teacher_output, targets) * (1 + noise)

    def configure_optimizers(self) -> Any:
        num_steps = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.trainable_parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=int(min(num_steps, 100)))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self(batch[0]).mean(), batch_size=len(batch[0]))


def bitwise() -> PipeBDStrategy:
    return PipeBDStrategy(exactness="bitwise", trials=3)


def loader(num_rows: int = 20, **options: Any) -> DataLoader[Any]:
    return DataLoader(ToyData(num_rows, SHAPE), batch_size=4, **options)


CASES: dict[str, Any] = {
    "shuffled": lambda: loader(22, shuffle=True),
    "a stream": lambda: DataLoader(ToyStream(ToyData(18, SHAPE)), batch_size=4),
    "a generator of the user's": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(2)),
}


def fit(make_trainer: MakeTrainer, name: str, folder: str) -> dict[str, Any]:
    module = SlowModule()
    trainer = make_trainer(max_epochs=2, default_root_dir=folder)
    trainer.fit(module, CASES[name](), loader(8))
    path = Path(folder) / f"{name}-{trainer.world_size}.ckpt"
    trainer.save_checkpoint(path)
    strategy = trainer.strategy
    plan = strategy.plan if isinstance(strategy, PipeBDStrategy) else None
    num_losses = module.num_losses
    # Once more on the same trainer, and the other ways to run it.
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, CASES[name](), ckpt_path=str(path))
    trainer.validate(module, loader(8), verbose=False)
    return {"path": str(path), "plan": plan, "num_losses": num_losses, "student": module.student.state_dict()}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    return on_both(fit, list(CASES), str(tmp_path_factory.mktemp("fits")), plan=bitwise)


@pytest.mark.parametrize("name", CASES)
def test_the_student_of_a_found_plan_is_that_of_one_process(name: str, fits: dict[str, Both]) -> None:
    one, ranks = fits[name]
    plans = [rank["plan"] for rank in ranks]
    assert plans[0] == plans[1]
    assert {rank for job in plans[0].student for rank, _ in job} == {0, 1}
    assert_same_checkpoint(load(one["path"]), load(ranks[0]["path"]))
    assert sum(rank["num_losses"] for rank in ranks) == one["num_losses"]
    # Under the strategy a generator goes on where the checkpoint was written; under plain Lightning it starts anew.
    student = ranks[0]["student"] if name == "a generator of the user's" else one["student"]
    for key, value in student.items():
        assert all(torch.equal(value, rank["student"][key]) for rank in ranks)


def explained(make_trainer: MakeTrainer, folder: str) -> dict[str, Any]:
    pictures = {"plot": f"{folder}/timeline.svg", "report": f"{folder}/run.html"}
    timeline = Timeline(f"{folder}/timeline.json", first_step=2, num_steps=3, **pictures)
    with heard() as lines:
        trainer = make_trainer(max_epochs=1, callbacks=[timeline])
        trainer.fit(SlowModule(), loader(40))
    return {"lines": "\n".join(lines), "outlook": trainer.strategy.outlook}


def test_a_found_plan_is_explained_and_compared_and_drawn(tmp_path: Path) -> None:
    zero, one = under_plan(explained, str(tmp_path), plan=bitwise)
    assert zero["outlook"].plan == one["outlook"].plan
    assert zero["outlook"].measurement == one["outlook"].measurement
    for words in ("predicted: ", "one device (", "exactness: bitwise", "measured: "):
        assert words in zero["lines"]
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["step"] for event in spans} == {2, 3, 4}
    learned = {(event["pid"], event["name"].split(" ")[1]) for event in spans if event["cat"] == "LEARN"}
    plan = zero["outlook"].plan
    assert learned == {(rank, f"block={block}") for block in range(3) for rank in plan.student_ranks(block)}
    assert (tmp_path / "timeline.svg").read_text().count("rank 1") >= 2
    page = (tmp_path / "run.html").read_text()
    assert page.count("<svg") == 2
    for words in (f"plan: {format_plan(plan)} ", "the measured one is", "bubble share", "per step over "):
        assert words in page


def wrong_costs() -> PipeBDStrategy:
    costs = constant_costs([(200, 1), (200, 1), (200, 800)])
    return PipeBDStrategy(costs=Measurement(costs=costs, num_rows=4), exactness="bitwise")


def drifting(make_trainer: MakeTrainer) -> tuple[Any, str]:
    with heard() as lines:
        trainer = make_trainer(max_epochs=1)
        trainer.fit(SlowModule(), loader(48))
    return trainer.strategy.plan, "\n".join(lines)


def test_a_drift_is_told_and_a_better_plan_is_offered() -> None:
    (plan, text), (_, silence) = under_plan(drifting, plan=wrong_costs)
    assert format_plan(plan) == "0-1,T2|S2"
    assert "That is more than 25 % off." in text
    offered = re.search(r"another plan is predicted to take .* from a checkpoint with `plan=\"(.*)\"`", text)
    assert offered is not None
    assert parse_plan(offered[1]).num_ranks == 2
    assert "another plan" not in silence


def given_costs() -> PipeBDStrategy:
    costs = constant_costs([(1, 3), (1, 3), (2, 6)])
    return PipeBDStrategy(costs=Measurement(costs=costs, num_rows=4))


def undecided() -> PipeBDStrategy:
    costs = replace(constant_costs([(2, 8), (2, 4), (2, 4)]), noise=0.4)
    return PipeBDStrategy(costs=Measurement(costs=costs, num_rows=4), exactness="bitwise", trials=2)


def tried(make_trainer: MakeTrainer) -> tuple[Any, str]:
    with heard() as lines:
        trainer = make_trainer(fast_dev_run=True)
        trainer.fit(SlowModule(), loader(8), loader(4))
    return trainer.strategy.outlook, "\n".join(lines)


def test_the_fastest_is_taken_of_plans_between_which_predictions_cannot_decide() -> None:
    (outlook, lines), (other, silence) = under_plan(tried, plan=undecided)
    assert outlook.plan == other.plan
    times = re.search(r"tried for 8 steps each: straight ([0-9.]+) ms, (.*) ([0-9.]+) ms\.", lines)
    assert times is not None
    assert outlook.choice.family == ("straight" if float(times[1]) <= float(times[3]) else times[2])
    assert "tried" not in silence


def too_little_memory() -> PipeBDStrategy:
    return PipeBDStrategy(memory_limit=100)


def given_plan_without_memory() -> PipeBDStrategy:
    return PipeBDStrategy("0|1-2", memory_limit=100)


def single(make_trainer: MakeTrainer) -> Any:
    module = SlowModule(0.0)
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(module, loader(8), loader(4))
    return trainer.strategy.plan, module.num_losses


def test_given_costs_are_used_as_they_are() -> None:
    (plan, _), (other, _) = under_plan(single, plan=given_costs)
    assert plan == other == Plan.straight([2, 1])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (too_little_memory, r"must leave room for some plan, but even the one with the least need.*of 100 bytes"),
        (given_plan_without_memory, r"must fit the memory of every rank, but rank 0 needs [0-9,]+ of 100 bytes"),
    ],
)
def test_what_does_not_fit_the_memory_is_refused_with_the_numbers(strategy: Any, message: str) -> None:
    with pytest.raises(RankError, match=message):
        under_plan(single, plan=strategy)


def unusual(make_trainer: MakeTrainer) -> list[Any]:
    warnings.filterwarnings("ignore", message="Total length of .* is zero")
    found = []
    trainer = make_trainer(max_epochs=1)
    trainer.fit(SlowModule(0.0), DataLoader([], batch_size=2))
    found.append(trainer.strategy.plan)
    trainer = make_trainer()
    try:
        trainer.fit(SlowModule(0.0), (batch for batch in loader(8)))
    except ValueError as error:
        found.append(str(error))
    return found


def test_loaders_that_cannot_be_looked_at() -> None:
    for plan, refusal in under_plan(unusual, plan=bitwise):
        assert plan == Plan.straight([3, 0])
        assert "`plan` must be given if the training data is an iterator that runs only once" in refusal


def test_a_timeline_under_another_strategy_is_refused() -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Timeline()],
        max_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(TypeError, match="`Timeline` must run under `strategy='pipebd'`, but the strategy is Single"):
        trainer.fit(SlowModule(0.0), loader(8), loader(4))
