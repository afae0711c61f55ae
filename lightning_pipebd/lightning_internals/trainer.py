"""Private names of Lightning's trainer: its loops, its loaders, its signal handlers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "batch_number",
    "begin_next_epoch",
    "find_last_checkpoint",
    "follow_requeue_signal",
    "has_bare_loader",
    "is_logging_step",
    "logged_keys",
    "logging_step",
    "may_end_or_validate_after",
    "redirect_signals",
    "request_train_loader",
    "seed_workers",
    "set_terminated",
    "silence_resume_warning",
    "silence_sigterm_broadcast",
    "stops_between_batches",
    "validates_by_time",
    "without_train_loader",
]

_SIGTERM_BROADCAST = "_broadcast_sigterm_tensor"


def silence_sigterm_broadcast(trainer: Trainer) -> None:
    """Switch off the broadcast over all ranks with which Lightning starts every batch (since 2.5.2).

    It would make the ranks step in lock-step: a rank could not run ahead, and the pipeline would be filled anew for
    every batch. What SIGTERM does is in :mod:`~lightning_pipebd.signals`.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, _SIGTERM_BROADCAST):
        setattr(loop, _SIGTERM_BROADCAST, lambda: None)


def redirect_signals(trainer: Trainer, terminate: Callable[[], None], requeue: Callable[[int], None]) -> None:
    """Have SIGTERM and SLURM's requeue signal call these, in the signal handler, instead of what Lightning does there.

    To be called before Lightning registers its handlers, hence in set-up. SIGTERM still goes on to launched processes.
    """
    connector = trainer._signal_connector

    def on_terminate(signum: int, frame: object) -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and not connector.received_sigterm:
            launcher.kill(signum)
        terminate()

    connector._sigterm_notifier_fn = on_terminate  # type: ignore[assignment, method-assign]
    connector._slurm_sigusr_handler_fn = lambda signum, _: requeue(signum)  # type: ignore[method-assign]


def follow_requeue_signal(trainer: Trainer, signum: int) -> None:
    """**Collective** over all ranks: save a checkpoint and requeue the job, as Lightning does for the signal."""
    connector = trainer._signal_connector
    type(connector)._slurm_sigusr_handler_fn(connector, signum, None)  # type: ignore[arg-type]  # the frame is not used


def set_terminated(trainer: Trainer) -> None:
    """Have Lightning's loops raise ``SIGTERMException`` at the next place where they ask."""
    trainer._signal_connector.received_sigterm = True


def stops_between_batches(trainer: Trainer) -> bool:
    """Tell whether nothing is under way after the present batch: its gradients have been used."""
    return not trainer.fit_loop._should_accumulate()


def silence_resume_warning() -> None:
    """Have Lightning not warn of loaders that cannot go on in the middle of an epoch: under the strategy, they can."""
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")


def begin_next_epoch(trainer: Trainer) -> None:
    """Have an epoch that follows a resume begin as every other one.

    Lightning (2.5 to 2.6 at least) completes the epoch of a checkpoint that was written after its last batch, and then
    takes the next one for the rest of it: counts are one short from there on, and a second resume repeats the epoch.
    """
    loop = trainer.fit_loop
    if loop.restarted_mid_epoch and loop.epoch_progress.current.completed == loop.epoch_progress.current.ready:
        loop.reset_restart_stage()


def seed_workers(loader: object, position: int) -> None:
    """Let a loader's workers draw what one process would have them draw (``seed_everything(workers=True)``).

    Lightning does this for the loaders that it gets back from a strategy, and with the number of the process; ours hide
    the user's, and the plan says which process loads.

    Args:
        loader: The user's loader.
        position: 0 for the rank that loads the first rows, 1 for the next.
    """
    _auto_add_worker_init_fn(loader, position)


def logging_step(trainer: Trainer) -> int:
    """Give the step that Lightning's loggers write now: optimizer steps so far, counted as the loggers count."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_logging_step(trainer: Trainer) -> bool:
    """Tell whether Lightning writes training metrics after the present batch."""
    if trainer.fit_loop._should_accumulate():
        return False
    interval = int(getattr(trainer, "log_every_n_steps", 0))
    is_due = interval > 0 and (logging_step(trainer) + 1) % interval == 0
    return is_due or trainer.should_stop or bool(getattr(trainer, "fast_dev_run", False))


def request_train_loader(trainer: Trainer) -> Any:
    """Give what the user trains on; calls their ``train_dataloader`` hook, if that is where it comes from."""
    return trainer.fit_loop._data_source.dataloader()


@contextmanager
def without_train_loader(trainer: Trainer) -> Iterator[None]:
    """Forget afterwards which loader was set up inside the context, so that training sets up its own."""
    loop = trainer.fit_loop
    before = loop._combined_loader, loop._data_fetcher
    try:
        yield
    finally:
        loop._combined_loader, loop._data_fetcher = before


def find_last_checkpoint(trainer: Trainer) -> Any:
    """Give the path that ``ckpt_path="last"`` stands for in this process; ``None`` if there is none."""
    fn, connector = trainer.state.fn, trainer._checkpoint_connector
    return None if fn is None else connector._parse_ckpt_path(fn, "last", model_provided=True, model_connected=True)


def logged_keys(trainer: Trainer) -> list[str]:
    """Name the values that an evaluation exchanges at its end, in the order in which it does."""
    results = trainer._results if trainer.evaluating or trainer.sanity_checking else None
    found = results.valid_items() if results is not None else ()
    return [key for key, value in found if value.meta.on_epoch and not value.meta.sync.rank_zero_only]


def has_bare_loader(trainer: Trainer) -> bool:
    """Tell whether a training batch is what one loader gives, and no collection that has this in it."""
    combined = trainer.fit_loop._combined_loader
    return combined is not None and len(combined.flattened) == 1 and combined.iterables is combined.flattened[0]


def batch_number(trainer: Trainer) -> int:
    """Give the number in the epoch of the batch that Lightning asks the loader for."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def may_end_or_validate_after(trainer: Trainer, batch_index: int) -> bool:
    """Tell whether something else than the next batch of the epoch may follow a batch that is about to be given.

    Args:
        trainer: In an epoch of training.
        batch_index: Number of the batch in the epoch.
    """
    is_last = batch_index + 1 >= trainer.num_training_batches
    ends = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step + 1
    if is_last or ends or not trainer.enable_validation:
        return is_last or ends
    if validates_by_time(trainer):
        return True
    if trainer.check_val_every_n_epoch is None:
        batch_index = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    interval = trainer.val_check_batch
    return interval is not None and interval != float("inf") and (batch_index + 1) % int(interval) == 0


def validates_by_time(trainer: Trainer) -> bool:
    """Tell whether ``val_check_interval`` is a time (since Lightning 2.6)."""
    return getattr(trainer, "_val_check_time_interval", None) is not None
