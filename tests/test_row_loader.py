"""A loader that goes on in the middle of an epoch leaves out what was trained, without loading it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_pipebd.data import TrainLoader
from lightning_pipebd.data_position import DataPosition
from lightning_pipebd.row_loader import RowLoader
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.transport import Lane
from tests.helpers.ranks import RankError, run_threads
from tests.helpers.toy import ToyData, ToyStream

WHOLE, HALF = (Fraction(0), Fraction(1)), (Fraction(0), Fraction(1, 2))


def rows_of(row_loader: RowLoader, num_skipped: int) -> list[list[int]]:
    torch.manual_seed(4)
    return [loaded.batch[1].tolist() for loaded in row_loader.load(num_skipped)]


def keep_lists(rows: Any) -> Any:
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


@pytest.mark.parametrize("interval", [WHOLE, HALF], ids=["whole", "half"])
@pytest.mark.parametrize("options", [{}, {"collate_fn": keep_lists}], ids=["default collate", "own collate"])
def test_skipped_batches_are_drawn_but_not_loaded(interval: Any, options: dict[str, Any]) -> None:
    data = ToyData(20, (2,))
    loader = DataLoader(data, batch_size=4, shuffle=True, **options)
    everything = rows_of(RowLoader(loader, interval), 0)
    data.asked.clear()
    assert rows_of(RowLoader(loader, interval), 3) == everything[3:]
    rows_asked = 8 if interval == WHOLE or options else 4
    assert len(data.asked) == rows_asked


def test_a_stream_is_read_up_to_the_place() -> None:
    loader = DataLoader(ToyStream(ToyData(20, (2,))), batch_size=4)
    assert rows_of(RowLoader(loader, WHOLE), 3) == rows_of(RowLoader(loader, WHOLE), 0)[3:]


def test_the_next_epoch_is_drawn_anew_after_the_resumed_one() -> None:
    def make() -> TrainLoader:
        return TrainLoader(RowLoader(DataLoader(ToyData(12, (2,)), batch_size=4, shuffle=True), WHOLE))

    def labels(batches: Any) -> list[list[int]]:
        return [batch[1].tolist() for batch in batches]

    torch.manual_seed(6)
    loader = make()
    first = iter(loader)
    begun = labels([next(first), next(first)])
    position = loader.position(2)
    assert position is not None
    rest, second = labels(first), labels(loader)

    torch.manual_seed(99)
    resumed = make()
    resumed.resumed = DataPosition.from_plain(position.to_plain())
    assert labels(resumed) == rest
    assert labels(resumed) == second
    assert len(begun) == 2


@pytest.mark.parametrize("num_rows", [12, 18, 24])
def test_ranks_whose_datasets_differ_say_so(num_rows: int) -> None:
    world = LocalWorld(2)

    def load(rank: int) -> int:
        transport = world.transports[rank]
        interval = HALF if rank == 0 else (Fraction(1, 2), Fraction(1))
        row_loader = RowLoader(DataLoader(ToyData(num_rows if rank else 16, (2,)), batch_size=4), interval)
        if rank == 0:
            outbox = Outbox(transport, [1], Lane.HEADERS)
            count = len(list(TrainLoader(row_loader, outbox=outbox, seeded_peers=(1,))))
            outbox.close()
            return count
        return len(list(TrainLoader(row_loader, mailbox=Mailbox(transport, 0, Lane.HEADERS))))

    with pytest.raises(RankError, match="`train_dataloader` must give the same batches on every rank, but gives"):
        run_threads(2, load)
