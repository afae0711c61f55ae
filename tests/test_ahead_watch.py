"""What teacher blocks one batch ahead rely on: whoever changes it is told, or the teacher stays with its batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from typing_extensions import override

from lightning_pipebd import BlockwiseDistillationModule
from lightning_pipebd.ahead_session import AheadSession, session_kind
from lightning_pipebd.ahead_watch import HookWatch, Seen, WatchedJobs, check_may_teach_ahead, see_batch
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.row_loader import Loaded
from tests.helpers.plans import whole_jobs
from tests.helpers.toy import MODULES, LinearModule, make_module

AHEAD = whole_jobs([0, 1, 0, 1], [1, 0, 0, 1])
WAY_OUT = "leave `teach_ahead` out, or `ahead` out of the plan"


class TestSeen:
    def test_sees_other_values_changes_in_place_and_lengths(self) -> None:
        tensor, items = torch.zeros(2), [1]
        before = Seen([tensor, items, "text"])
        assert before.is_same(Seen([tensor, items, "text"]))
        assert not before.is_same(Seen([tensor.clone(), items, "text"]))
        assert not before.is_same(Seen([tensor, items]))
        items.append(2)
        assert not before.is_same(Seen([tensor, items, "text"]))
        before = Seen([tensor])
        tensor[:1] += 1
        assert not before.is_same(Seen([tensor]))

    def test_tensors_of_inference_mode_are_seen_without_their_changes(self) -> None:
        with torch.inference_mode():
            tensor = torch.zeros(2)
            before = Seen([tensor])
            tensor += 1
        assert before.is_same(Seen([tensor]))
        assert not before.is_same(Seen([torch.zeros(2)]))

    def test_batches_are_seen_leaf_by_leaf(self) -> None:
        batch = {"image": torch.zeros(2), "sizes": [(1, 2), torch.ones(2)]}
        before = see_batch(batch)
        assert before.is_same(see_batch({**batch}))
        batch["image"] = batch["image"] / 2
        assert not before.is_same(see_batch(batch))


class TestForwardHooks:
    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    def test_teacher_that_tells_of_its_calls_is_refused_where_it_would_be_ahead(self, register: str) -> None:
        module = LinearModule()
        handle = getattr(next(own for own in module.teacher.modules() if isinstance(own, nn.Linear)), register)(print)
        with pytest.raises(
            ValueError, match=rf"`teacher` must have no forward hooks .*`teacher\.0\.0` \(Linear\).*{WAY_OUT}"
        ):
            session_kind(AHEAD, module)
        assert session_kind(parse_plan("0|1|2|3"), module) is not AheadSession
        handle.remove()
        assert session_kind(AHEAD, module) is AheadSession

    def test_norms_of_weights_and_pruning_are_no_listeners(self) -> None:
        teacher = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        nn.utils.spectral_norm(teacher[0])
        nn.utils.parametrizations.weight_norm(teacher[1])
        nn.utils.prune.l1_unstructured(teacher[2], "weight", 0.5)  # type: ignore[no-untyped-call]
        student = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        check_may_teach_ahead(
            BlockwiseDistillationModule(teacher, student, teacher_blocks=[*teacher], student_blocks=[*student])
        )


class TestTeacher:
    def test_blocks_that_nobody_changes_may_teach_and_change_themselves(self) -> None:
        teacher = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))
        module = BlockwiseDistillationModule(teacher, nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), {"0": "0", "1": "1"})
        teacher.train()
        jobs = WatchedJobs(module, Precision())
        before = teacher[0].running_mean.clone()
        jobs.teach(1, jobs.teach(0, torch.rand(4, 6)))
        assert not torch.equal(teacher[0].running_mean, before)
        jobs.check_teacher()

    @pytest.mark.parametrize(
        "change",
        [
            lambda teacher: teacher[1].weight.mul_(0.5),
            lambda teacher: teacher.load_state_dict(teacher.state_dict()),
            lambda teacher: setattr(teacher[1], "weight", nn.Parameter(torch.eye(6))),
            lambda teacher: teacher[0].running_mean.add_(1),
            lambda teacher: setattr(teacher[0], "running_mean", torch.ones(6)),
        ],
        ids=["in place", "loaded", "another weight", "buffer", "another buffer"],
    )
    def test_teacher_that_somebody_changes_after_it_taught_is_told_of(self, change: Callable[[Any], Any]) -> None:
        teacher = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))
        module = BlockwiseDistillationModule(teacher, nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), {"0": "0", "1": "1"})
        jobs = WatchedJobs(module, Precision())
        boundary = torch.rand(4, 6)
        for block in (0, 1):
            boundary = jobs.teach(block, boundary)
        with torch.no_grad():
            change(teacher)
        with pytest.raises(RuntimeError, match=rf"The teacher of block \d \(`\d`\) must stay as it was.*{WAY_OUT}"):
            jobs.check_teacher()
        for block in (0, 1):
            boundary = jobs.teach(block, boundary)
        jobs.check_teacher()

    @pytest.mark.parametrize("name", sorted(MODULES))
    def test_all_tensors_of_all_blocks_are_watched(self, name: str) -> None:
        module = make_module(name)
        jobs = WatchedJobs(module, Precision())
        found = [table[key] for block in range(module.num_blocks) for table, key in jobs._find_places(block)]
        used = [
            value for block in module.block_pairs.teacher.blocks for value in (*block.parameters(), *block.buffers())
        ]
        assert {id(value) for value in used} == {id(value) for value in found}


class Stepping(LinearModule):
    """Unpacks with something of its own."""

    def __init__(self, leave: Callable[[Any, Tensor], Any] = lambda module, inputs: None) -> None:
        super().__init__()
        self.leave = leave
        self.register_buffer("mean", torch.zeros(()))
        self.norm = nn.BatchNorm1d(6)
        self.history: list[Tensor] = []
        self.counts: Counter[int] = Counter()
        self.num_seen = 0

    @override
    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        self.leave(self, batch[0])
        return batch[0], batch[1]


def leave_number(module: Any, inputs: Tensor) -> None:
    module.num_seen += 1


LEAVES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "number": (leave_number, "self.num_seen"),
    "attribute": (lambda module, inputs: setattr(module, "inputs", inputs), "self.inputs"),
    "buffer": (lambda module, inputs: module.mean.lerp_(inputs.mean(), 0.2), "self._buffers"),
    "submodule": (lambda module, inputs: module.norm(inputs), "self.norm._buffers"),
    "list": (lambda module, inputs: module.history.append(inputs.sum()), "self.history"),
    "counter": (lambda module, inputs: module.counts.update([3]), "self.counts"),
}


class TestHooks:
    @pytest.mark.parametrize("name", sorted(LEAVES))
    def test_what_is_left_behind_is_named(self, name: str) -> None:
        leave, changed = LEAVES[name]
        module = Stepping(leave)
        watch = HookWatch(module)
        for _ in range(2):
            before = watch.look()
            module.unpack_batch((torch.rand(4, 6), None))
            assert watch.changes_since(before) == [changed]

    def test_nothing_is_left_behind_by_hooks_that_only_compute(self) -> None:
        module = Stepping(lambda module, inputs: inputs * module.mean)
        watch = HookWatch(module)
        before = watch.look()
        with module.putting_off_logs():
            module.unpack_batch((torch.rand(4, 6), None))
        assert min(map(len, before)) > 3
        assert watch.changes_since(before) == []

    def test_a_long_container_is_seen_by_its_length(self) -> None:
        module = Stepping()
        module.history = [torch.zeros(())] * 1000
        watch = HookWatch(module)
        before = watch.look()
        module.history[7] = torch.ones(())
        assert watch.changes_since(before) == []
        module.history.append(torch.ones(()))
        assert watch.changes_since(before) == ["self.history"]

    def test_hooks_of_a_data_module_are_watched_too(self) -> None:
        class Data(LightningDataModule):
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                self.last = batch
                return batch

        data = Data()
        watch = HookWatch(LinearModule(), data)
        before = watch.look()
        data.on_after_batch_transfer(torch.zeros(1), 0)
        assert watch.changes_since(before) == ["datamodule.last"]

    def test_nobody_looks_where_nobody_has_hooks(self) -> None:
        assert HookWatch(LinearModule(), LightningDataModule()).look() == []


class Moved(AheadBatch):
    """Is on the device."""

    @override
    def moved(self, *args: Any) -> Any:
        return self._batch


def make_session(module: LinearModule) -> AheadSession:
    """A session without ranks, whose executor does nothing."""
    session = AheadSession.__new__(AheadSession)
    session.__dict__ |= {
        "_module": module,
        "_jobs": WatchedJobs(module, Precision()),
        "_hooks": HookWatch(module),
        "_strategy": SimpleNamespace(batch_to_device=None),
        "_executor": SimpleNamespace(run=lambda *args: {}, forget=lambda program: None),
        "_program": lambda *args, **kwargs: None,
        "num_steps": 0,
    }
    return session


def make_batch() -> Moved:
    return Moved([torch.rand(4, 6), torch.zeros(4)])


class TestSession:
    def test_first_batch_that_leaves_something_behind_ends_looking_ahead(self) -> None:
        session = make_session(Stepping(leave_number))
        with pytest.warns(UserWarning, match=rf"has changed `self\.num_seen`: so the teacher does not .*{WAY_OUT}"):
            session._prepare(make_batch(), is_early=False)
        assert not session._may_look(0)

    def test_later_batch_that_leaves_something_behind_is_refused(self) -> None:
        module = Stepping()
        session = make_session(module)
        session._prepare(make_batch(), is_early=False)
        session._prepare(make_batch(), is_early=True)
        module.leave = leave_number
        with pytest.raises(RuntimeError, match=rf"must leave nothing behind .*`self\.num_seen` .*{WAY_OUT}"):
            session._prepare(make_batch(), is_early=True)

    @pytest.mark.parametrize(
        "change",
        [
            lambda batch: batch[0].mul_(0.5),
            lambda batch: batch.__setitem__(0, batch[0] * 0.5),
            lambda batch: batch[1].zero_(),
        ],
        ids=["in place", "another tensor", "labels"],
    )
    def test_batch_that_is_changed_after_it_was_unpacked_is_refused(self, change: Callable[[Any], Any]) -> None:
        session = make_session(LinearModule())
        prepared = make_batch()
        session._prepare(prepared, is_early=True)
        step = partial(session._work_off, Loaded(prepared, 4, Rows(0, 4)), prepared._batch, update=True)
        assert step() == {}
        change(prepared._batch)
        with pytest.raises(RuntimeError, match=f"A batch must stay as it is from .*{WAY_OUT}"):
            step()

    def test_what_unpacking_logs_is_logged_when_the_batch_is_trained_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logged: list[tuple[str, float, dict[str, Any]]] = []
        monkeypatch.setattr(
            LightningModule, "log", lambda module, name, value, **options: logged.append((name, float(value), options))
        )
        module = Stepping(lambda module, inputs: module.log_dict({"largest": inputs.max()}, on_epoch=True))
        session, prepared = make_session(module), make_batch()
        largest = float(prepared._batch[0].max())
        session._prepare(prepared, is_early=True)
        assert logged == []
        session._work_off(Loaded(prepared, 4, Rows(0, 4)), prepared._batch, update=True)
        ((name, value, options),) = logged
        assert (name, value, options["on_epoch"]) == ("largest", largest, True)

    def test_teacher_is_checked_where_it_has_taught_the_batch_a_step_ago(self) -> None:
        session = make_session(LinearModule())
        prepared = make_batch()
        session._prepare(prepared, is_early=True)
        session._jobs.teach(0, prepared._batch[0])
        for parameter in session._module.teacher.parameters():
            parameter.add_(1)
        loaded = Loaded(prepared, 4, Rows(0, 4), is_first=False, num_next_rows=4)
        session._work_off(loaded, prepared._batch, update=True)
        with pytest.raises(RuntimeError, match="The teacher of block 0"):
            session._work_off(loaded, prepared._batch, update=True)
        session._work_off(loaded._replace(is_first=True, num_next_rows=0), prepared._batch, update=True)
        session._work_off(loaded, prepared._batch, update=True)

    def test_hook_that_comes_after_set_up_is_refused_at_the_beginning_of_an_epoch(self) -> None:
        session = make_session(LinearModule())
        session._module.teacher.get_submodule("2").register_forward_hook(print)
        with pytest.raises(ValueError, match="`teacher` must have no forward hooks"):
            session._work_off(Loaded(None, 4, Rows(0, 0)), None, update=True)

    def test_programs_for_batches_of_ever_other_sizes_are_forgotten(self) -> None:
        session = make_session(LinearModule())
        del session.__dict__["_program"]
        session.__dict__ |= {"_plan": AHEAD, "_rank": 0}
        for rows in range(1, 100):
            session._program(rows, rows + 1, is_taught=True, update=True)
        assert session._program.cache_info().currsize == 64  # type: ignore[attr-defined]
