"""The rows that all ranks load make up the batches of one process, in order, and no other rows are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_pipebd.data import (
    BatchHeader,
    EvaluationLoader,
    HeaderLoader,
    TrainLoader,
    check_loader,
    header_loader,
)
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.random_streams import random_states
from lightning_pipebd.runtime.transport import Lane, ProcessGroupTransport, Transport
from tests.helpers.loaders import LOADERS, NUM_ROWS, MakeLoader, Moody, Numbers, Part, parts_of, put_together, shuffled
from tests.helpers.ranks import run_processes, run_threads, seed_generators


class Untouchable:
    """A loader that has a length and nothing else that may be used."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a rank without rows must not load")


def split(*shares: tuple[int, str], num_ranks: int) -> Plan:
    """A plan of one block whose teacher is split so."""
    teacher = [[list(share) for share in shares]]
    return Plan.from_dict({"num_ranks": num_ranks, "teacher": teacher, "student": [[[0, 1]]]})


PLANS = {
    "one": Plan.joint(1, 1),
    "even": Plan.joint(1, 3),
    "uneven, not in rank order, one rank without rows": split((2, "1/6"), (0, "1/2"), (3, "1/3"), num_ranks=4),
}


def make_rank(plan: Plan, transport: Transport, loader: Any) -> tuple[Any, Outbox | Mailbox]:
    """The training loader of one rank, and what has to be closed."""
    first, *others = plan.loading_ranks
    if transport.rank == first:
        outbox = Outbox(transport, [rank for rank in range(plan.num_ranks) if rank != first], Lane.HEADERS)
        return TrainLoader(row_loader(plan, first, loader), outbox=outbox, seeded_peers=tuple(others)), outbox
    mailbox = Mailbox(transport, first, Lane.HEADERS)
    if transport.rank in others:
        return TrainLoader(row_loader(plan, transport.rank, loader), mailbox=mailbox), mailbox
    return header_loader(loader, mailbox), mailbox


def row_loader(plan: Plan, rank: int, loader: Any) -> RowLoader:
    shares = plan.teacher[0]
    position = plan.loading_ranks.index(rank)
    start = sum((share.share for share in shares[:position]), Fraction(0))
    return RowLoader(loader, (start, start + shares[position].share))


@contextmanager
def ranks(plan: Plan, make_loader: MakeLoader) -> Iterator[list[Any]]:
    """The training loaders of all ranks, the first loading rank's first.

    One after another can be iterated, in this order: headers wait in their mailboxes.
    """
    first = plan.loading_ranks[0]
    transports = sorted(LocalWorld(plan.num_ranks).transports, key=lambda transport: transport.rank != first)
    everyone = [make_rank(plan, transport, make_loader()) for transport in transports]
    yield [loader for loader, _ in everyone]
    for _, box in everyone:
        box.close()


class TestTrainLoaders:
    @pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
    @pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS.keys())
    def test_ranks_together_load_the_batches_of_one_process(self, plan: Plan, make_loader: MakeLoader) -> None:
        reference = make_loader()
        seed_generators()
        expected = [[batch.tolist() for batch in reference] for _ in range(2)]
        seed_generators()
        with ranks(plan, make_loader) as loaders:
            seen = [put_together([parts_of(loader, loader) for loader in loaders]) for _ in range(2)]
        assert seen == expected

    def test_only_own_rows_are_asked_of_the_dataset(self) -> None:
        with ranks(PLANS["even"], shuffled) as loaders:
            parts = [parts_of(loader, loader) for loader in loaders]
            asked = [loader.dataset.asked for loader in loaders]
        assert asked == [[value for part in mine for value in part.values] for mine in parts]
        assert sorted(value for mine in asked for value in mine) == list(range(NUM_ROWS))

    def test_rank_without_rows_never_touches_its_loader(self) -> None:
        with ranks(split((1, "1"), num_ranks=2), lambda: DataLoader(Numbers(), batch_size=4)) as (loader, other):
            header = HeaderLoader(Untouchable(), other._mailbox)
            parts_of(loader, loader)
            assert [part.num_rows for part in parts_of(header, header)] == [4, 4, 4, 4, 4, 3]
            assert len(header) == 5

    @pytest.mark.parametrize(("num_rows", "sizes"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (256, [86, 85, 85])])
    def test_batch_is_neither_padded_nor_rounded(self, num_rows: int, sizes: list[int]) -> None:
        with ranks(Plan.joint(1, 3), lambda: DataLoader(Numbers(num_rows), batch_size=256)) as loaders:
            parts = [parts_of(loader, loader) for loader in loaders]
        assert [len(part.values) for (part,) in parts] == sizes
        assert put_together(parts) == [list(range(num_rows))]

    @pytest.mark.parametrize("num_taken", [0, 1, 3])
    def test_epoch_that_ended_early_leaves_nothing_behind(self, num_taken: int) -> None:
        with ranks(PLANS["uneven, not in rank order, one rank without rows"], LOADERS["in order"]) as loaders:
            early = [list(islice(loader, num_taken)) for loader in loaders]
            seen = put_together([parts_of(loader, loader) for loader in loaders])
        assert [len(batches) for batches in early] == [num_taken] * 4
        assert seen == [batch.tolist() for batch in DataLoader(Numbers(), batch_size=4)]

    def test_look_ahead_beyond_an_early_end_leaves_nothing_behind(self) -> None:
        with ranks(Plan.joint(1, 2), LOADERS["in order"]) as loaders:
            iterators = [iter(loader) for loader in loaders]
            for iterator in iterators:
                next(iterator)
                next(iterator)
            assert [len(loader.loaded) for loader in loaders] == [2, 2]
            again = put_together([parts_of(loader, loader) for loader in loaders])
        assert again == [batch.tolist() for batch in DataLoader(Numbers(), batch_size=4)]

    def test_epoch_begun_twice_is_one_epoch(self) -> None:
        with ranks(PLANS["uneven, not in rank order, one rank without rows"], shuffled) as loaders:
            iterators = [(iter(loader), iter(loader))[1] for loader in loaders]
            parts = [parts_of(loader, mine) for loader, mine in zip(loaders, iterators, strict=True)]
        assert sorted(value for batch in put_together(parts) for value in batch) == list(range(NUM_ROWS))

    def test_loader_without_length_has_none_on_any_rank(self) -> None:
        with ranks(split((0, "1"), num_ranks=2), LOADERS["stream"]) as loaders:
            for loader in loaders:
                with pytest.raises(TypeError, match=r"has no len\(\)|has no length"):
                    len(loader)

    def test_length_is_the_number_of_batches_on_every_rank(self) -> None:
        with ranks(PLANS["uneven, not in rank order, one rank without rows"], LOADERS["in order"]) as loaders:
            assert [len(loader) for loader in loaders] == [6] * 4

    def test_loading_ranks_show_the_attributes_of_the_users_loader(self) -> None:
        with ranks(Plan.joint(1, 2), LOADERS["in order"]) as loaders:
            assert [loader.batch_size for loader in loaders] == [4, 4]
            with pytest.raises(AttributeError, match="no_such_attribute"):
                loaders[0].no_such_attribute  # noqa: B018 - reading it is the test

    def test_state_of_a_stateful_loader_is_the_loading_ranks(self) -> None:
        class Stateful(Untouchable):
            def state_dict(self) -> dict[str, Any]:
                raise AssertionError

            load_state_dict = state_dict

        with ranks(split((0, "1"), num_ranks=2), Stateful) as (_, header):
            assert header.state_dict() == {}
            header.load_state_dict({"position": 3})

    @pytest.mark.parametrize("is_nested", [False, True])
    def test_loader_that_deals_to_ranks_already_is_refused(self, is_nested: bool) -> None:
        sampler: Any = DistributedSampler(Numbers(), num_replicas=2, rank=0)
        batch_sampler = BatchSampler(sampler, 4, False)
        loader = (
            DataLoader(Numbers(), batch_sampler=batch_sampler) if is_nested else DataLoader(Numbers(), sampler=sampler)
        )
        with pytest.raises(ValueError, match="A dataloader must yield whole batches on every rank"):
            check_loader(loader)

    @pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS.keys())
    def test_other_loaders_are_accepted(self, make_loader: MakeLoader) -> None:
        check_loader(make_loader())


def load_rows(make_loader: MakeLoader, start: Fraction, stop: Fraction, **options: Any) -> list[Loaded]:
    return list(RowLoader(make_loader(), (start, stop), **options).load())


THIRD = Fraction(1, 3)


class TestRowLoader:
    # Python warns of forks beside other threads, of which this process has some by now.
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_workers_load_what_the_process_itself_would(self) -> None:
        def make() -> DataLoader[Tensor]:
            return shuffled(num_workers=2)

        parts = [load_rows(make, index * THIRD, (index + 1) * THIRD) for index in range(3)]
        seen = [[Part(loaded.num_rows, loaded.rows, loaded.batch.tolist()) for loaded in mine] for mine in parts]
        assert put_together(seen) == [batch.tolist() for batch in shuffled()]

    @pytest.mark.parametrize("make_loader", [LOADERS["batch sampler"], LOADERS["list of batches"]])
    def test_batches_without_own_rows_come_in_their_places(self, make_loader: MakeLoader) -> None:
        seen = load_rows(make_loader, THIRD, 2 * THIRD)
        reference = list(make_loader())
        assert [loaded.num_rows for loaded in seen] == [len(batch) for batch in reference]
        for loaded, batch in zip(seen, reference, strict=True):
            assert loaded.rows == Rows(-(-len(batch) // 3), -(-2 * len(batch) // 3))
            expected = None if loaded.rows.is_empty else batch[loaded.rows.start : loaded.rows.stop].tolist()
            assert (None if loaded.batch is None else loaded.batch.tolist()) == expected

    def test_never_any_row_is_an_epoch_of_empty_batches(self) -> None:
        seen = load_rows(lambda: DataLoader(Numbers(), batch_size=1), THIRD, 2 * THIRD)
        assert seen == [Loaded(None, 1, Rows(1, 1))] * NUM_ROWS

    def test_all_rows_come_from_the_users_own_loader(self) -> None:
        loader = shuffled()
        assert [loaded.batch.tolist() for loaded in RowLoader(loader, (Fraction(0), Fraction(1))).load()] == [
            batch.tolist() for batch in shuffled()
        ]
        assert sorted(loader.dataset.asked) == list(range(NUM_ROWS))  # type: ignore[attr-defined]

    def test_users_loader_keeps_its_batch_sampler(self) -> None:
        loader = DataLoader(Numbers(), batch_size=4)
        before = loader.batch_sampler
        list(RowLoader(loader, (Fraction(0), THIRD)).load())
        assert loader.batch_sampler is before
        assert len(list(loader)) == 6

    def test_leaves_without_rows_are_not_cut(self) -> None:
        batch = {"x": torch.arange(6), "y": [torch.zeros(6, 2)], "table": torch.zeros(4), "scale": torch.tensor(1.0)}
        (loaded,) = load_rows(lambda: [batch], THIRD, 2 * THIRD)
        assert loaded.batch["x"].tolist() == [2, 3]
        assert [loaded.batch["y"][0].shape, loaded.batch["table"].shape] == [(2, 2), (4,)]
        assert loaded.batch["scale"] is batch["scale"]

    @pytest.mark.parametrize("make_loader", [LOADERS["in order"], LOADERS["stream"]])
    def test_first_batch_that_is_too_small_is_not_divided_and_none_after_it(self, make_loader: MakeLoader) -> None:
        seen = load_rows(make_loader, THIRD, 2 * THIRD, min_rows=5)
        assert [loaded.batch.tolist() for loaded in seen] == [batch.tolist() for batch in make_loader()]

    def test_later_batch_that_is_too_small_is_divided(self) -> None:
        seen = load_rows(LOADERS["in order"], THIRD, 2 * THIRD, min_rows=4)
        assert [loaded.rows for loaded in seen] == [Rows(2, 3)] * 5 + [Rows(1, 2)]


def evaluate(make_loader: MakeLoader, num_ranks: int, num_passes: int = 1) -> list[list[list[int]]]:
    """What each rank sees of each batch, over passes through the data; nothing where it gets a header."""
    world = LocalWorld(num_ranks)

    def work(rank: int) -> list[list[int]]:
        interval = (Fraction(rank, num_ranks), Fraction(rank + 1, num_ranks))
        loader = EvaluationLoader(RowLoader(make_loader(), interval, min_rows=num_ranks), world.transports[rank])
        batches = [batch for _ in range(num_passes) for batch in loader]
        return [[] if isinstance(batch, BatchHeader) else batch.tolist() for batch in batches]

    return run_threads(num_ranks, work)


def joined(ranks: list[list[list[int]]]) -> list[list[int]]:
    """Every batch, its parts in rank order."""
    return [[value for part in parts for value in part] for parts in zip(*ranks, strict=True)]


class TestEvaluationLoaders:
    @pytest.mark.parametrize("make_loader", [shuffled, LOADERS["in order"], LOADERS["stream"]])
    def test_every_row_is_evaluated_once_on_one_rank(self, make_loader: MakeLoader) -> None:
        seen = evaluate(make_loader, 3)
        assert joined(seen) == [batch.tolist() for batch in make_loader()]

    def test_passes_are_alike(self) -> None:
        seen = evaluate(shuffled, 2, num_passes=2)
        assert sorted(value for rank in seen for batch in rank[:6] for value in batch) == list(range(NUM_ROWS))
        assert sorted(value for rank in seen for batch in rank[6:] for value in batch) == list(range(NUM_ROWS))

    def test_short_last_batch_leaves_a_rank_without_rows(self) -> None:
        seen = evaluate(lambda: DataLoader(Numbers(9), batch_size=4), 4)
        assert [rank[2] for rank in seen] == [[8], [], [], []]

    def test_fewer_rows_than_ranks_in_the_first_batch_go_whole_to_every_rank(self) -> None:
        seen = evaluate(lambda: DataLoader(Numbers(5), batch_size=2), 3)
        assert seen == [[[0, 1], [2, 3], [4]]] * 3

    def test_length_is_the_number_of_batches(self) -> None:
        loader = EvaluationLoader(RowLoader(shuffled(), (Fraction(0), THIRD)), LocalWorld(1).transports[0])
        assert (len(loader), loader.batch_size) == (6, 4)


class Seen(NamedTuple):
    """What one process came to: training epochs, evaluated batches, and whether its generators were left alone."""

    epochs: list[list[Part]]
    evaluated: list[list[int]]
    are_states_kept: bool


def state_values() -> list[Any]:
    states = random_states()
    _, keys, *rest = states["numpy"]
    return [states["torch"].tolist(), states["python"], keys.tolist(), rest]


def load_in_process(rank: int, plan: Plan, make_loader: MakeLoader) -> Seen:
    """Iterate as one rank of several that were seeded differently."""
    torch.distributed.init_process_group("gloo")
    transport = ProcessGroupTransport(torch.device("cpu"))
    if rank != plan.loading_ranks[0]:
        seed_generators(rank)
    before = state_values()
    loader, box = make_rank(plan, transport, make_loader())
    epochs = [parts_of(loader, loader) for _ in range(2)]
    box.close()
    interval = (Fraction(rank, plan.num_ranks), Fraction(rank + 1, plan.num_ranks))
    batches = list(EvaluationLoader(RowLoader(make_loader(), interval), transport))
    evaluated = [[] if isinstance(batch, BatchHeader) else batch.tolist() for batch in batches]
    return Seen(epochs, evaluated, state_values() == before)


def make_moody() -> DataLoader[Tensor]:
    return DataLoader(Numbers(), batch_sampler=Moody())


@pytest.mark.spawn
def test_processes_with_other_seeds_load_the_batches_of_the_first_loading_rank() -> None:
    plan = split((0, "1/2"), (2, "1/2"), num_ranks=3)
    seen = run_processes(3, load_in_process, plan, make_moody)
    seed_generators()
    reference = make_moody()
    expected = [[batch.tolist() for batch in reference] for _ in range(3)]
    assert [put_together([rank.epochs[epoch] for rank in seen]) for epoch in range(2)] == expected[:2]
    assert joined([rank.evaluated for rank in seen]) == expected[2]
    assert [rank.are_states_kept for rank in seen] == [False, True, True]
