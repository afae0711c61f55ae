"""What must be the same in all processes of a run: where it is not, they wait for each other for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Trainer

from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.session_choice import PlanRequest

__all__ = ["check_same_settings", "compare_settings"]

# Settings of the trainer that decide when all ranks meet.
_TRAINER = (
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "accumulate_grad_batches",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "fast_dev_run",
)


def check_same_settings(
    transport: Transport, trainer: Trainer, module: DistillationModule, request: PlanRequest
) -> None:
    """**Collective** over all ranks: compare what they must agree upon.

    Args:
        transport: Reaches the other ranks.
        trainer: The trainer.
        module: What is trained.
        request: What the user said about the plan.

    Raises:
        ValueError: The ranks differ.
    """
    finder = request.finder
    values: dict[str, Any] = {
        "lightning_pipebd": _digest_package(),
        "lightning": lightning.__version__,
        "module": type(module).__qualname__,
        "plan": request.given_plan(module, transport.num_ranks),
        "exactness": finder.exactness,
        "memory_limit": finder.memory_limit,
        "costs": finder.costs,
        "trials": finder.trials,
        "replan": finder.replans,
        "max_in_flight": finder.max_in_flight,
        **asdict(request.options),
        **{name: getattr(trainer, name) for name in _TRAINER},
        # Saving and stopping are done by all ranks together; a callback that only looks may be on one rank alone.
        "ModelCheckpoint": [callback.state_key for callback in trainer.checkpoint_callbacks],
        "EarlyStopping": [callback.state_key for callback in trainer.early_stopping_callbacks],
    }
    compare_settings(transport, {name: repr(value) for name, value in values.items()})


def compare_settings(transport: Transport, settings: Mapping[str, str]) -> None:
    """**Collective** over all ranks: compare settings.

    Args:
        transport: Reaches the other ranks.
        settings: By name, as text.

    Raises:
        ValueError: The ranks differ; on all of them, with the first setting that differs.
    """
    everyone = transport.all_gather_object(dict(settings))
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"`{name}` must be the same in all processes, but is {_short(value)} on rank 0 and "
                    f"{_short(theirs.get(name, 'not known'))} on rank {rank}. Start all of them with the same code and "
                    "the same arguments."
                )


@cache
def _digest_package() -> str:
    # Not the version: what is installed on one machine may be another state of the same version.
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
