"""Validating, testing and predicting: the values of one process, with and without a fit before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from tests.helpers.scenarios import Both, MakeTrainer, on_both
from tests.helpers.toy import NUM_CLASSES, LinearModule, ToyData

pytestmark = pytest.mark.spawn

PLAN, NUM_RANKS = "0|1-2|3", 3

#: Rows and batch sizes of the loaders.
CASES: dict[str, list[tuple[int, int]]] = {
    "rows that ranks do not divide": [(20, 4)],
    "a last batch with fewer rows than ranks": [(14, 4)],
    "batches with fewer rows than ranks": [(5, 2)],
    "a single row": [(1, 4)],
    "two loaders": [(14, 4), (9, 5)],
    "two loaders, one of small batches": [(14, 4), (4, 2)],
}


class EvaluationModule(LinearModule):
    """Logs in every way that Lightning knows."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracies = nn.ModuleList(MulticlassAccuracy(NUM_CLASSES, average="micro") for _ in range(4))
        self.confusions = nn.ModuleList(MulticlassConfusionMatrix(NUM_CLASSES) for _ in range(4))

    def evaluate(self, batch: Any, dataloader_idx: int, where: str) -> Any:
        inputs, labels = batch
        logits = self(inputs)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        self.log(f"{where}/loss", losses.mean())
        self.log(f"{where}/sum", losses.sum(), reduce_fx="sum")
        self.log(f"{where}/max", losses.max(), reduce_fx="max")
        self.log(f"{where}/min", losses.min(), reduce_fx=torch.min)
        self.log(f"{where}/number", len(labels), reduce_fx="sum")
        self.log_dict({f"{where}/mean": losses.mean(), f"{where}/half": 0.5}, batch_size=len(labels))
        self.log(f"{where}/both", losses.mean(), on_step=True, on_epoch=True, batch_size=len(labels))
        accuracy = self.accuracies[dataloader_idx]
        accuracy(logits, labels)
        self.log(f"{where}/accuracy", accuracy)
        self.confusions[dataloader_idx].update(logits, labels)
        return losses.mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.evaluate(batch, dataloader_idx, "val")

    def on_validation_epoch_end(self) -> None:
        for index, confusion in enumerate(metric for metric in self.confusions if metric.update_called):
            self.log(f"diagonal {index}", confusion.compute().diagonal().sum().float())
            confusion.reset()

    on_test_epoch_end = on_validation_epoch_end

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.evaluate(batch, dataloader_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch[0]), batch_idx, dataloader_idx


def loaders(name: str) -> list[DataLoader[Any]]:
    return [DataLoader(ToyData(rows, LinearModule.shape), batch_size=size) for rows, size in CASES[name]]


def metrics(trainer: Trainer) -> dict[str, float]:
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def evaluate_before_and_after_a_fit(make_trainer: MakeTrainer, name: str) -> dict[str, Any]:
    torch.manual_seed(11)
    module = EvaluationModule()
    train = DataLoader(ToyData(20, module.shape), batch_size=4)
    found: dict[str, Any] = {}
    # A metric that is reset in inference mode cannot be used outside of it, with or without a plan.
    trainer = make_trainer(inference_mode=False)
    found["validate"] = trainer.validate(module, loaders(name), verbose=False)
    found["test"] = trainer.test(module, loaders(name), verbose=False)
    found["predict"] = trainer.predict(module, loaders(name))
    trainer.fit(module, train, loaders(name))
    found["fit"] = metrics(trainer)
    found["validate after fit"] = trainer.validate(module, loaders(name), verbose=False)
    found["test after fit"] = trainer.test(module, loaders(name), verbose=False)
    found["predict after fit"] = trainer.predict(module, loaders(name))
    found["test with another trainer"] = make_trainer(inference_mode=False).test(module, loaders(name), verbose=False)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, train, loaders(name))
    found["second fit"] = metrics(trainer)
    found["student"] = module.student.state_dict()
    return found


@pytest.fixture(scope="module")
def evaluations() -> dict[str, Both]:
    return on_both(evaluate_before_and_after_a_fit, list(CASES), plan=PLAN, num_ranks=NUM_RANKS)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_one_process_on_every_rank(name: str, evaluations: dict[str, Both]) -> None:
    one, ranks = evaluations[name]
    for rank in ranks:
        assert list(rank) == list(one)
        for key in one:
            torch.testing.assert_close(
                rank[key], one[key], rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
            )
