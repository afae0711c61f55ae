"""Run scenarios under plain Lightning and under a plan, and give what each rank saw."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Trainer, seed_everything
from torch import distributed

from lightning_pipebd import PipeBDStrategy
from tests.helpers.ranks import run_processes

__all__ = ["Both", "MakeTrainer", "on_both", "on_one_process", "under_plan"]

#: Makes a quiet trainer on the ranks of the scenario; takes further arguments of the trainer.
MakeTrainer = Callable[..., Trainer]

#: True of many small runs: no loader workers, few batches, no validation, no logs, and what Lightning calls of torch.
_EXPECTED_WARNINGS = (
    r"You are trying to `self.log\(\)` but `Trainer\(barebones=True\)` is configured",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+_dataloader' does not have many workers",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"Your `IterableDataset` has `__len__` defined",
    r"This process .* is multi-threaded, use of fork\(\) may lead to deadlocks",
)


class Both(NamedTuple):
    """What a scenario returned in one process under plain Lightning, and on each rank of a plan."""

    one: Any
    ranks: list[Any]


def on_one_process(scenario: Callable[..., Any], *args: object) -> Any:
    """Give the result of ``scenario(make_trainer, *args)`` under plain Lightning in one process."""
    return run_processes(1, _run, scenario, args, None, 1)[0]


def under_plan(
    scenario: Callable[..., Any], *args: object, plan: Any = "0-1|2-4", num_ranks: int = 2, timeout: float = 60.0
) -> list[Any]:
    """Give what ``scenario(make_trainer, *args)`` returned on each rank of a plan, in rank order.

    Args:
        scenario: Called once per rank.
        args: Handed on.
        plan: What the strategy is given, or a function that makes the strategy.
        num_ranks: How many processes.
        timeout: Seconds after which a missing result is an error.
    """
    return run_processes(num_ranks, _run, scenario, args, plan, num_ranks, timeout=timeout)


def on_both(
    scenario: Callable[..., Any],
    names: Sequence[str],
    *args: object,
    plan: Any = "0-1|2-4",
    num_ranks: int = 2,
    timeout: float = 180.0,
) -> dict[str, Both]:
    """Run ``scenario(make_trainer, name, *args)`` for every name, all of them in one launch of processes."""
    one = run_processes(1, _run, _run_cases, (scenario, names, *args), None, 1, timeout=timeout)[0]
    ranks = run_processes(num_ranks, _run, _run_cases, (scenario, names, *args), plan, num_ranks, timeout=timeout)
    return {name: Both(one[name], [rank[name] for rank in ranks]) for name in names}


def _run_cases(
    make_trainer: MakeTrainer, scenario: Callable[..., Any], names: Sequence[str], *args: object
) -> dict[str, Any]:
    results = {}
    for name in names:
        seed_everything(3, verbose=False)
        try:
            results[name] = scenario(make_trainer, name, *args)
        except Exception as error:
            raise RuntimeError(f"case {name!r} failed: {error}") from error
        # Lightning leaves the group of a case open, and would take the next one, on its own, for distributed.
        if distributed.is_initialized() and distributed.get_world_size() == 1:
            distributed.destroy_process_group()
    return results


def _run(rank: int, scenario: Callable[..., Any], args: tuple[Any, ...], plan: Any, num_ranks: int) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # A warning that plain Lightning does not give is a failure here as in every test.
    warnings.simplefilter("error")
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    seed_everything(3, verbose=False)

    def make_trainer(**changes: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": num_ranks,
            "strategy": "auto" if plan is None else plan() if callable(plan) else PipeBDStrategy(plan=plan),
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(**{**defaults, **changes})

    return scenario(make_trainer, *args)
