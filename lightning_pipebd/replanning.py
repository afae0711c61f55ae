"""Another plan from the next epoch on: everything that is spread over ranks moves, and training goes on as it would."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset

from lightning_pipebd.automatic_pipeline import FoundPipeline
from lightning_pipebd.automatic_plan import FoundPlan, UnreadLoader
from lightning_pipebd.checkpoint import share_from_zero
from lightning_pipebd.evaluation import Evaluation
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.session import TrainingSession
from lightning_pipebd.session_choice import SessionChoice

__all__ = ["EpochwiseLoader", "Replanning", "can_move"]


class Replanning(Evaluation):
    """The part of the strategy that changes the plan between two epochs."""

    _max_in_flight: int
    _time_limits: tuple[timedelta | None, timedelta]
    _found: FoundPlan | FoundPipeline | None

    def training_loader(self, loader: Any, *, replans: bool) -> Any:
        """Give what this rank iterates over; if the plan may change, every epoch begins with the plan of then."""
        if self._session is None:
            return UnreadLoader(loader)
        return EpochwiseLoader(self, loader) if replans else self.load_by_plan(loader)

    def load_by_plan(self, loader: Any) -> Any:
        """Give what this rank iterates over under the present plan."""
        assert self._session is not None
        return self._session.process_dataloader(loader)

    def change_plan(self, loader: Any) -> bool:
        """**Collective** over all ranks, between two epochs: take up the better plan that was found, if there is one.

        Whatever is spread over ranks goes the way it takes through a checkpoint: weights and buffers, the optimizers'
        states, loss scales, stopped blocks, and the random states with which the next epoch is drawn.

        Returns:
            Whether the plan has changed.
        """
        old = self._session
        if not isinstance(old, TrainingSession) or old.better is None:
            return False
        outlook = old.better
        if outlook.plan.loading_ranks != old.plan.loading_ranks and not can_move(loader):
            rank_zero_info(
                "The plan is kept, because its successor would have other ranks load the data, and only a plain "
                "DataLoader of a dataset with indices can change hands."
            )
            return False
        self._move(old, outlook)
        return True

    def _move(self, old: TrainingSession, outlook: Outlook) -> None:
        module, transport = old.module, self._transport
        assert transport is not None
        self._assemble_student()
        checkpoint = {"optimizer_states": [self.optimizer_state(optimizer) for optimizer in self.optimizers]}
        checkpoint = share_from_zero(transport, checkpoint)
        old.scalers.save(checkpoint)
        module.finite_guard.flush()
        module.finite_guard.gather(checkpoint, transport)
        place = old.place_in_data()
        old.release_optimizers()
        old.end()
        choice = SessionChoice.open_found(
            FoundPlan(outlook.plan, outlook),
            self,
            module,
            transport,
            max_in_flight=self._max_in_flight,
            time_limits=self._time_limits,
        )
        assert isinstance(choice.session, TrainingSession)
        self._session, self._found = choice.session, choice.found
        choice.session.take_over(old)
        choice.session.resumed = place
        choice.report(replans=True)
        choice.session.prune(self.optimizers)
        self.load_optimizer_state_dict(checkpoint)
        module.finite_guard.load(checkpoint)
        self._handed_over_at = choice.session.num_steps
        rank_zero_info(choice.explanation)


class EpochwiseLoader:
    """A training loader that is made anew when the plan has changed since the last epoch.

    Args:
        strategy: Changes the plan.
        loader: The user's.
    """

    def __init__(self, strategy: Replanning, loader: Any) -> None:
        self._strategy = strategy
        self._loader = loader
        self._present = strategy.load_by_plan(loader)

    def __len__(self) -> int:
        return len(self._present)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_present", "_strategy", "_loader"):
            raise AttributeError(name)
        return getattr(self._present, name)

    def __iter__(self) -> Iterator[Any]:
        if self._strategy.change_plan(self._loader):
            self._present = self._strategy.load_by_plan(self._loader)
        return iter(self._present)


def can_move(loader: object) -> bool:
    """Tell whether all that a loader remembers from epoch to epoch is in random generators."""
    return (
        isinstance(loader, DataLoader)
        and not hasattr(loader, "state_dict")
        and not isinstance(loader.dataset, IterableDataset)
        and all(
            type(sampler).__module__.startswith("torch.utils.data")
            for sampler in (loader.sampler, loader.batch_sampler)
            if sampler is not None
        )
    )
