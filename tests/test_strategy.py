"""What one tries in the first hour: every way to say how long, how often and on what to train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning_pipebd import PipeBDStrategy
from tests.helpers.scenarios import Both, MakeTrainer, on_both, under_plan
from tests.helpers.toy import ToyData, ToyStream, make_module
from tests.helpers.training import assert_same_checkpoint, load

pytestmark = pytest.mark.spawn

SHAPE = (6,)


class Recorder(Callback):
    """Every call of a user's callback, with what it sees of the progress."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def note(self, trainer: Trainer, event: str, *details: Any) -> None:
        self.events.append((event, trainer.current_epoch, trainer.global_step, *details))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(trainer, "train start", trainer.num_training_batches)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(trainer, "epoch start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.note(trainer, "batch start", batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note(trainer, "batch end", batch_idx, sorted(outputs))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(trainer, "epoch end")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(trainer, "validation start", trainer.sanity_checking)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.note(trainer, "validation batch end", args[3:])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val_acc")
        self.note(trainer, "validation end", None if accuracy is None else round(accuracy.item(), 9))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(trainer, "train end")


class ShortStream(IterableDataset[tuple[Tensor, Tensor]]):
    """Says that it is longer than it is."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(ToyStream(ToyData(20, SHAPE)))

    def __len__(self) -> int:
        return 40


class EndlessStream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from ToyStream(ToyData(20, SHAPE))


class RandomData(ToyData):
    """Rows with noise, as augmentation makes."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = super().__getitem__(index)
        return inputs + torch.randn(()), label


class Batches:
    """An iterable with a length that is no DataLoader."""

    def __init__(self) -> None:
        self.loader = loader(20)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class ToyDataModule(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader(20, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(10)


def loader(num_rows: int = 20, batch_size: int = 4, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(ToyData(num_rows, SHAPE), batch_size=batch_size, **arguments)


#: Keys of a case that are no argument of the trainer.
OURS = {"data", "validation", "callback", "seed_workers", "make_strategy"}


def fit(make_trainer: MakeTrainer, name: str) -> dict[str, Any]:
    case, module, recorder = CASES[name], make_module("linear"), Recorder()
    seed_everything(3, workers=case.get("seed_workers", False), verbose=False)
    settings = {key: value for key, value in case.items() if key not in OURS}
    if "make_strategy" in case:
        settings["strategy"] = case["make_strategy"]()
    trainer = make_trainer(callbacks=[recorder, *([case["callback"]()] if "callback" in case else [])], **settings)
    data = case.get("data", loader)()
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data, loader(14) if case.get("validation", True) else None)
    return {"events": recorder.events, "student": module.student.state_dict()}


class EndEpoch(Callback):
    """Ends an epoch early, as a user's hook may."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 and trainer.current_epoch == 0 else None


class StopAfterTwo(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 2


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "a plan that is found": {"make_strategy": lambda: PipeBDStrategy(exactness="bitwise")},
    "max_steps": {"max_steps": 7},
    "max_steps and no max_epochs": {"max_steps": 7, "max_epochs": -1},
    "max_epochs=0": {"max_epochs": 0},
    "limit_train_batches=3": {"limit_train_batches": 3},
    "limit_train_batches=0.5": {"limit_train_batches": 0.5},
    "limit_train_batches=0": {"limit_train_batches": 0},
    "limit_val_batches=0": {"limit_val_batches": 0},
    "limit_val_batches=2": {"limit_val_batches": 2},
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run=3": {"fast_dev_run": 3},
    "overfit_batches=2": {"overfit_batches": 2},
    "overfit_batches=0.5": {"overfit_batches": 0.5},
    "num_sanity_val_steps=0": {"num_sanity_val_steps": 0},
    "num_sanity_val_steps=-1": {"num_sanity_val_steps": -1},
    "val_check_interval=2": {"val_check_interval": 2},
    "val_check_interval=0.5": {"val_check_interval": 0.5},
    "validation by training batches": {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 3},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
    "reload with a data module": {"reload_dataloaders_every_n_epochs": 1, "data": ToyDataModule},
    "accumulate_grad_batches": {"accumulate_grad_batches": 2},
    "deterministic": {"deterministic": True},
    "detect_anomaly": {"detect_anomaly": True},
    "profiler": {"profiler": "simple"},
    "inference_mode=False": {"inference_mode": False},
    "barebones": {"barebones": True},
    "an epoch that a callback ends": {"callback": EndEpoch},
    "a callback that stops": {"callback": StopAfterTwo},
    "a short last batch": {"data": lambda: loader(22)},
    "drop_last": {"data": lambda: loader(22, drop_last=True)},
    "one batch": {"data": lambda: loader(3)},
    "a shuffled loader": {"data": lambda: loader(22, shuffle=True)},
    "a loader with a generator": {
        "data": lambda: loader(22, shuffle=True, generator=torch.Generator().manual_seed(7)),
    },
    "a sampler": {"data": lambda: loader(20, sampler=RandomSampler(range(20), replacement=True, num_samples=13))},
    "a batch sampler": {
        "data": lambda: DataLoader(
            ToyData(20, SHAPE), batch_sampler=BatchSampler(SequentialSampler(range(20)), 3, drop_last=False)
        ),
    },
    "two workers": {"data": lambda: loader(22, shuffle=True, num_workers=2)},
    "persistent workers": {
        "data": lambda: loader(22, shuffle=True, num_workers=1, persistent_workers=True, prefetch_factor=3),
    },
    "random data": {"data": lambda: DataLoader(RandomData(20, SHAPE), batch_size=4, shuffle=True)},
    "random data from workers": {
        "data": lambda: DataLoader(RandomData(20, SHAPE), batch_size=4, shuffle=True, num_workers=1),
    },
    "random data from seeded workers": {
        "data": lambda: DataLoader(RandomData(20, SHAPE), batch_size=4, shuffle=True, num_workers=1),
        "seed_workers": True,
    },
    "any iterable of batches": {"data": Batches},
    "a data module": {"data": ToyDataModule},
    "a stream": {"data": lambda: DataLoader(ToyStream(ToyData(22, SHAPE)), batch_size=4)},
    "a stream from a worker": {"data": lambda: DataLoader(ToyStream(ToyData(22, SHAPE)), batch_size=4, num_workers=1)},
    "a stream without validation": {
        "data": lambda: DataLoader(ToyStream(ToyData(22, SHAPE)), batch_size=4),
        "validation": None,
    },
    "a stream and a limit": {
        "data": lambda: DataLoader(ToyStream(ToyData(22, SHAPE)), batch_size=4),
        "limit_train_batches": 3,
        "val_check_interval": 2,
    },
    "a stream and more validation": {
        "data": lambda: DataLoader(ToyStream(ToyData(22, SHAPE)), batch_size=4),
        "val_check_interval": 2,
    },
    "an endless stream": {"data": lambda: DataLoader(EndlessStream(), batch_size=4), "max_steps": 7, "max_epochs": -1},
    "a stream that ends before its length": {"data": lambda: DataLoader(ShortStream(), batch_size=4)},
    "a generator of batches": {"data": lambda: (batch for batch in loader(20)), "max_epochs": 1},
}


@pytest.fixture(scope="module")
def fits() -> dict[str, Both]:
    return on_both(fit, list(CASES), plan="0-1|2-3")


@pytest.mark.parametrize("name", CASES)
def test_fit_goes_as_in_one_process(name: str, fits: dict[str, Both]) -> None:
    one, ranks = fits[name]
    for rank in ranks:
        assert rank["events"] == one["events"]
        for key, value in one["student"].items():
            assert torch.equal(value, rank["student"][key])


def test_one_device_trains_as_plain_lightning(fits: dict[str, Both]) -> None:
    alone, plain = fits["a plan that is found"].one, fits["defaults"].one
    assert alone["events"] == plain["events"]
    torch.testing.assert_close(alone["student"], plain["student"], rtol=0, atol=0)


def evaluate_and_save(make_trainer: MakeTrainer, name: str, folder: str) -> dict[str, Any]:
    module = make_module("linear")
    trainer = make_trainer()
    trainer.fit(module, loader(20), loader(14))
    getattr(trainer, name)(module, loader(14), **({} if name == "predict" else {"verbose": False}))
    path = Path(folder) / f"{name}-{trainer.world_size}.ckpt"
    trainer.save_checkpoint(path)
    return load(path) if trainer.is_global_zero else {}


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_a_checkpoint_after_an_evaluation_is_that_of_one_process(name: str, saved: dict[str, Both]) -> None:
    one, (many, _) = saved[name]
    assert_same_checkpoint(one, many)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    folder = str(tmp_path_factory.mktemp("saved"))
    return on_both(evaluate_and_save, ["validate", "test", "predict"], folder, plan="0-1|2-3")


def use_the_loader(make_trainer: MakeTrainer) -> tuple[int, int, int]:
    module = make_module("linear")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(20), loader(14))
    return (
        len(trainer.train_dataloader.dataset),
        trainer.train_dataloader.batch_size,
        len(trainer.val_dataloaders.dataset),
    )


def test_loaders_that_the_trainer_shows_are_like_the_users_on_every_rank() -> None:
    assert under_plan(use_the_loader, plan="0-1|2-3") == [(20, 4, 14)] * 2
