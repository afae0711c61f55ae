"""What SIGTERM and SLURM's requeue signal do: they are noted when they arrive, and followed between two steps.

Lightning answers both in the signal handler: with a broadcast over all ranks, and by saving a checkpoint. Ranks of a
plan are at different steps then, and wait for each other there for ever.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_pipebd.fit_callbacks import FitCallback
from lightning_pipebd.lightning_internals.trainer import (
    follow_requeue_signal,
    redirect_signals,
    set_terminated,
    stops_between_batches,
)
from lightning_pipebd.runtime.progress import Progress
from lightning_pipebd.runtime.step_agreement import END, SAVE

__all__ = ["SignalFollower", "describe_end", "give_exit_status", "handle_signals_outside_fit"]

_STATUS = 128 + signal.SIGTERM


class SignalFollower(FitCallback):
    """Do what signals asked for, on all ranks after the same step.

    SIGTERM ends the run there; SLURM's requeue signal has all ranks save, and rank 0 requeue the job. In an evaluation,
    SIGTERM ends each rank after its batch.

    Args:
        trainer: Whose signals are redirected, until it redirects them again.
        progress: Carries the requests of this rank to the others.
    """

    def __init__(self, trainer: Trainer, progress: Progress) -> None:
        self._progress = progress
        self._requeue_signal = signal.SIGUSR1
        redirect_signals(trainer, self._terminate, self._requeue)

    def _terminate(self) -> None:
        self._progress.agreement.request(END)

    def _requeue(self, signum: int) -> None:
        self._requeue_signal = signal.Signals(signum)
        self._progress.agreement.request(SAVE)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Follow what is due after this step; the last of all callbacks, so the checkpoints of the step are written."""
        agreement = self._progress.agreement
        if agreement.is_open(END) or agreement.is_open(SAVE):
            self._progress.mark("agreeing on a step to stop after")
        for kind, is_agreed in agreement.step_done(can_stop=stops_between_batches(trainer)):
            if kind == END:
                set_terminated(trainer)
            elif is_agreed:
                rank_zero_info(f"All ranks save after step {trainer.global_step} to be requeued.")
                follow_requeue_signal(trainer, self._requeue_signal)
            else:
                rank_zero_warn(
                    "No checkpoint is saved for the requeue signal, because the ranks could not agree on a step. Allow "
                    "UDP between the machines."
                )

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """End an evaluation that is under way."""
        if self._progress.agreement.is_open(END):
            set_terminated(trainer)


def handle_signals_outside_fit(trainer: Trainer) -> None:
    """Have SIGTERM end an evaluation after the present batch, and the requeue signal do nothing but warn."""

    def warn(signum: int) -> None:
        rank_zero_warn(f"Signal {signum} requeues no job, because nothing is trained here. Start the job again.")

    redirect_signals(trainer, lambda: set_terminated(trainer), warn)


def give_exit_status(exception: BaseException) -> None:
    """Have a process that SIGTERM ended exit with 143, as a shell knows it; Lightning's exception says 0."""
    if isinstance(exception, SIGTERMException) and not exception.code:
        exception.args, exception.code = ("SIGTERM was received",), _STATUS


def describe_end(rank: int, num_steps: int) -> str:
    """Say why a rank ends that was told to."""
    return (
        f"Rank {rank} on {socket.gethostname()} (pid {os.getpid()}) ends after {num_steps} steps: SIGTERM was received."
    )
