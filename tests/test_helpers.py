from __future__ import annotations

import os
import threading

import lightning
import pytest
import torch
import torch.distributed
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.ranks import RankError, run_processes, run_threads


def multiply(rank: int, factor: int) -> int:
    return rank * factor


def refuse_on_rank_1(rank: int) -> int:
    if rank == 1:
        raise ValueError("rank 1 refuses")
    return rank


def wait_for_event(rank: int, event: threading.Event) -> None:
    if rank == 1:
        event.wait()


def stall_on_rank_1(rank: int) -> None:
    if rank == 1:
        threading.Event().wait()


def raise_while_peer_waits(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    if rank == 1:
        raise ValueError("rank 1 leaves the others waiting")
    torch.distributed.recv(torch.zeros(1), 1)


def die_on_rank_1(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    threading.Event().wait()


def return_what_cannot_be_pickled(rank: int) -> object:
    return lambda: rank


def read_launch(rank: int) -> tuple[str, str, str, int]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], torch.get_num_threads()


def sum_over_ranks(rank: int) -> torch.Tensor:
    torch.distributed.init_process_group("gloo")
    total = torch.full((3,), float(rank + 1))
    torch.distributed.all_reduce(total)
    return total


def claim_first_port_taken(rank: int, seen: str) -> str:
    port = os.environ["MASTER_PORT"]
    with open(seen, "a+") as file:
        file.seek(0)
        is_first = not file.read()
        file.write(port + "\n")
    if is_first:
        raise RuntimeError("[Errno 98] EADDRINUSE: address already in use")
    return port


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: tuple[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_regression(rank: int, directory: str) -> tuple[int, int, torch.Tensor]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    module = Regression()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4))
    return trainer.global_rank, trainer.global_step, module.layer.weight.detach()


def test_thread_results_come_in_rank_order() -> None:
    assert run_threads(4, multiply, 10) == [0, 10, 20, 30]


def test_thread_failure_names_rank_and_keeps_cause_and_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)Rank 1 of 3 failed: .*in refuse_on_rank_1.*rank 1 refuses") as raised:
        run_threads(3, refuse_on_rank_1)
    assert raised.value.rank == 1
    assert isinstance(raised.value.__cause__, ValueError)


def test_thread_timeout_shows_where_the_rank_stands() -> None:
    event = threading.Event()
    with pytest.raises(TimeoutError, match=r"(?s)rank\(s\) 1 gave none.*in wait_for_event"):
        run_threads(2, wait_for_event, event, timeout=0.2)
    event.set()


@pytest.mark.spawn
def test_process_results_come_in_rank_order() -> None:
    assert run_processes(3, multiply, 10) == [0, 10, 20]


@pytest.mark.spawn
def test_processes_find_an_external_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "17")
    assert run_processes(2, read_launch) == [("0", "0", "2", 1), ("1", "1", "2", 1)]


@pytest.mark.spawn
def test_process_failure_names_rank_and_keeps_cause_and_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)Rank 1 of 2 failed: .*in refuse_on_rank_1.*rank 1 refuses") as raised:
        run_processes(2, refuse_on_rank_1)
    assert raised.value.rank == 1
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.spawn
def test_process_failure_ends_the_ranks_that_wait_for_it() -> None:
    with pytest.raises(RankError, match=r"(?s)Rank 1 of 2 failed: .*rank 1 leaves the others waiting"):
        run_processes(2, raise_while_peer_waits)


@pytest.mark.spawn
def test_dead_process_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="Rank 1 of 2 failed: it ended with exit code 7 and no result"):
        run_processes(2, die_on_rank_1)


@pytest.mark.spawn
def test_result_that_cannot_be_pickled_is_a_failure_of_its_rank() -> None:
    with pytest.raises(RankError, match=r"(?s)Rank 0 of 1 failed: .*return_what_cannot_be_pickled"):
        run_processes(1, return_what_cannot_be_pickled)


@pytest.mark.spawn
def test_process_timeout_shows_where_the_rank_stands_and_ends_it() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)rank\(s\) 1 gave none.*in stall_on_rank_1"):
        run_processes(2, stall_on_rank_1, timeout=2.0)


@pytest.mark.spawn
def test_port_taken_by_another_process_is_replaced(tmp_path: os.PathLike[str]) -> None:
    (port,) = run_processes(1, claim_first_port_taken, os.fspath(tmp_path) + "/ports")
    with open(os.fspath(tmp_path) + "/ports") as file:
        first, second = file.read().split()
    assert (first != port, second) == (True, port)


@pytest.mark.spawn
def test_gloo_sum_reaches_every_rank() -> None:
    first, second = run_processes(2, sum_over_ranks)
    assert first.tolist() == second.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.spawn
def test_lightning_trainer_accepts_the_launch(tmp_path: os.PathLike[str]) -> None:
    (rank_0, steps_0, weight_0), (rank_1, steps_1, weight_1) = run_processes(2, fit_regression, os.fspath(tmp_path))
    assert (rank_0, rank_1) == (0, 1)
    assert (steps_0, steps_1) == (2, 2)
    assert torch.equal(weight_0, weight_1)
