"""A batch that is loaded a step early: nobody sees another order, and no random draw is another one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_pipebd.ahead_data import AheadTrainLoader
from lightning_pipebd.ahead_session import AheadSession, session_kind
from lightning_pipebd.data import HeaderLoader, TrainLoader
from lightning_pipebd.lightning_internals.trainer import may_end_or_validate_after
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.row_loader import RowLoader
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.transport import Lane
from lightning_pipebd.session import TrainingSession
from tests.helpers.plans import whole_jobs
from tests.helpers.toy import LinearModule

WHOLE = (Fraction(0), Fraction(1))


class Noise(Dataset[Tensor]):
    """Eleven rows with random augmentation."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index + torch.rand(()).item()])


class Rank:
    """The loading rank: unpacking draws, too, and what was unpacked is noted."""

    def __init__(
        self, never_after: tuple[int, ...] = (), outbox: Outbox | None = None, num_trained: int = 0, pure_until: int = 9
    ) -> None:
        self.unpacked: dict[int, float] = {}
        self.was_early: list[bool] = []
        self.num_given = num_trained
        rows = RowLoader(DataLoader(Noise(), batch_size=3, shuffle=True), WHOLE)
        self.loader = AheadTrainLoader(
            rows,
            outbox=outbox,
            prepare=self.prepare,
            number=lambda: self.num_given % 4,
            may_look=lambda number: number not in (*never_after, 3) and len(self.was_early) < pure_until,
        )

    def prepare(self, batch: AheadBatch, *, is_early: bool) -> None:
        self.was_early.append(is_early)
        self.unpacked[id(batch)] = torch.rand(()).item()

    def batches(self, num_batches: int | None = None) -> Iterator[tuple[list[float], float]]:
        """Give what a step trains on, unpacked in time or in the step itself."""
        for given in islice(self.loader, num_batches):
            loaded = self.loader.loaded.popleft()
            self.num_given += 1
            assert loaded.batch is given
            batch = given._batch if isinstance(given, AheadBatch) else given
            yield batch.flatten().tolist(), self.unpacked.get(id(given)) or torch.rand(()).item()


def as_in_one_process() -> list[tuple[list[float], float]]:
    loader = TrainLoader(RowLoader(DataLoader(Noise(), batch_size=3, shuffle=True), WHOLE))
    return [(batch.flatten().tolist(), torch.rand(()).item()) for batch in loader]


@pytest.mark.parametrize("never_after", [(), (1,), (0, 1, 2)])
def test_loading_and_unpacking_draw_in_the_order_of_one_process(never_after: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    expected = [as_in_one_process(), as_in_one_process()]
    after = torch.rand(())
    torch.manual_seed(4)
    rank = Rank(never_after)
    assert [list(rank.batches()), list(rank.batches())] == expected
    assert torch.equal(torch.rand(()), after)


def test_no_batch_is_looked_at_if_unpacking_the_first_shows_that_nobody_may() -> None:
    torch.manual_seed(4)
    expected = as_in_one_process()
    torch.manual_seed(4)
    rank = Rank(pure_until=1)
    assert list(rank.batches()) == expected
    assert rank.was_early == [False]


def test_run_that_goes_on_with_the_first_batch_of_the_loader_counts_as_the_trainer_does() -> None:
    rank = Rank(num_trained=2)
    next(rank.batches(1))
    position = rank.loader.position(3)
    assert position is not None
    assert position.now is not None
    now = torch.get_rng_state()
    # The batch ahead was drawn already; the position is that before it.
    assert not torch.equal(position.now.states["torch"], now)


def test_step_may_not_draw_from_a_generator_that_the_next_batch_was_drawn_from() -> None:
    steps = Rank().batches()
    next(steps)
    next(steps)
    torch.rand(())
    with pytest.raises(RuntimeError, match=r"must not draw random numbers where .* from torch\. .*leave `teach_ahead`"):
        next(steps)


def test_step_may_draw_from_other_generators_and_a_run_that_goes_on_keeps_what_it_drew() -> None:
    torch.manual_seed(4)
    expected = as_in_one_process()
    torch.manual_seed(4)
    random.seed(4)
    rank = Rank()
    steps = rank.batches()
    random.random()
    assert [next(steps), random.random() and next(steps)] == expected[:2]
    position = rank.loader.position(2)
    drawn = random.random()
    assert position is not None
    random.seed(5)
    resumed = Rank(num_trained=2)
    resumed.loader.resumed = position
    steps = resumed.batches()
    assert next(steps) == expected[2]
    assert random.random() == drawn


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_run_that_goes_on_draws_again_what_was_drawn_for_a_batch_ahead(num_batches: int) -> None:
    torch.manual_seed(4)
    expected = as_in_one_process()
    torch.manual_seed(4)
    rank = Rank()
    steps = rank.batches()
    assert [next(steps) for _ in range(num_batches)] == expected[:num_batches]
    position = rank.loader.position(num_batches)
    torch.manual_seed(99)
    for resumed in (Rank(num_trained=num_batches), Rank(never_after=(0, 1, 2), num_trained=num_batches)):
        resumed.loader.resumed = position
        assert list(resumed.batches()) == expected[num_batches:]


def test_every_rank_knows_the_rows_of_the_next_batch_and_which_batch_is_the_first() -> None:
    world = LocalWorld(2)
    outbox = Outbox(world.transports[0], [1], Lane.HEADERS)
    mailbox = Mailbox(world.transports[1], 0, Lane.HEADERS)
    rank, header = Rank(never_after=(1,), outbox=outbox), HeaderLoader([None] * 4, mailbox)
    for _ in range(2):
        announced: list[list[tuple[int, int, bool]]] = [[], []]
        for loader, parts in zip((rank.loader, header), announced, strict=True):
            for rank.num_given, _ in enumerate(loader, start=1):
                part = loader.loaded.popleft()
                parts.append((part.num_rows, part.num_next_rows, part.is_first))
        assert announced == [[(3, 3, True), (3, 0, False), (3, 2, False), (2, 0, False)]] * 2
    outbox.close()
    mailbox.close()


def trainer(**changes: Any) -> Any:
    progress = SimpleNamespace(total=SimpleNamespace(ready=changes.pop("ready", 0)))
    usual = {
        "num_training_batches": 9,
        "should_stop": False,
        "max_steps": -1,
        "global_step": 4,
        "enable_validation": True,
        "check_val_every_n_epoch": 1,
        "val_check_batch": 9,
        "_val_check_time_interval": None,
        "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    }
    return SimpleNamespace(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ({}, [8]),
        ({"enable_validation": False, "val_check_batch": 3}, [8]),
        ({"val_check_batch": 3}, [2, 5, 8]),
        ({"val_check_batch": float("inf")}, [8]),
        ({"max_steps": 5}, list(range(9))),
        ({"max_steps": 6}, [8]),
        ({"should_stop": True}, list(range(9))),
        ({"_val_check_time_interval": 60}, list(range(9))),
        ({"check_val_every_n_epoch": None, "val_check_batch": 4, "ready": 3}, list(range(9))),
        ({"check_val_every_n_epoch": None, "val_check_batch": 4, "ready": 4}, [8]),
    ],
)
def test_no_batch_is_loaded_early_where_something_else_may_come_first(
    changes: dict[str, Any], batches: list[int]
) -> None:
    assert [index for index in range(9) if may_end_or_validate_after(trainer(**changes), index)] == batches


class Stateful(DataLoader[Tensor]):
    """Counts what it has given."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Endless(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(1)


def make_loader(loader: Any, combined: CombinedLoader | None = None) -> AheadTrainLoader:
    """Give the loader of a session whose trainer was given another one in Lightning's wrapping."""
    fit_loop = trainer().fit_loop
    fit_loop._combined_loader = CombinedLoader(loader) if combined is None else combined
    session = AheadSession.__new__(AheadSession)
    session.__dict__ |= {"_outbox": None, "_trainer": trainer(fit_loop=fit_loop)}
    made = session._make_loader(RowLoader(loader, WHOLE), loader)
    assert isinstance(made, AheadTrainLoader)
    return made


@pytest.mark.parametrize(
    ("loader", "looks"),
    [
        (DataLoader(Noise(), batch_size=3), True),
        (Stateful(Noise(), batch_size=3), False),
        (DataLoader(Endless(), batch_size=3), False),
    ],
    ids=["plain", "stateful", "without a length"],
)
def test_teacher_stays_with_its_batch_where_nobody_may_look_ahead(loader: Any, looks: bool) -> None:
    assert make_loader(loader)._may_look(0) is looks


@pytest.mark.parametrize(
    ("wrap", "looks"),
    [
        (lambda loader: loader, True),
        (lambda loader: CombinedLoader(loader, "max_size_cycle"), True),
        (lambda loader: {"train": loader}, False),
        (lambda loader: [loader], False),
    ],
    ids=["bare", "combined", "in a dictionary", "in a list"],
)
def test_no_batch_is_looked_at_that_comes_in_a_collection(wrap: Callable[[Any], Any], looks: bool) -> None:
    loader = DataLoader(Noise(), batch_size=3)
    wrapped = wrap(loader)
    combined = wrapped if isinstance(wrapped, CombinedLoader) else CombinedLoader(wrapped)
    assert make_loader(loader, combined)._may_look(0) is looks


def test_momentum_teacher_stays_with_its_batch() -> None:
    plan = whole_jobs([0, 1, 0], [0, 1, 0])
    frozen, moving = LinearModule(), SimpleNamespace(block_momentum=object())
    assert session_kind(plan, frozen) is AheadSession
    assert session_kind(plan, moving) is TrainingSession  # type: ignore[arg-type]
    assert session_kind(parse_plan("0|1|2"), frozen) is TrainingSession
