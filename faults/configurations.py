"""Configurations drawn at random: each runs to its end, or is refused by an error that says what to change."""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from torch import nn
from torch.utils.data import DataLoader

import lightning_pipebd
from lightning_pipebd import PipeBDStrategy, Plan
from lightning_pipebd.lightning_internals.processes import _PreflightLauncher
from lightning_pipebd.runtime.relay import RelayError
from lightning_pipebd.runtime.transport import TransportError
from tests.helpers.ranks import RankError, run_processes
from tests.helpers.toy import LinearModule, ToyData, ToyStream

__all__ = ["Launched", "check_refusal", "try_alone", "try_setup", "try_together"]

OURS, LIGHTNING = (str(Path(module.__file__ or "").parent) for module in (lightning_pipebd, lightning))
REFUSALS = (ValueError, TypeError, FloatingPointError, MisconfigurationException)

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "stop": lambda: EarlyStopping("train/loss_epoch", patience=1),
    "stop at nothing": lambda: EarlyStopping("nothing"),
    "stop at a step": lambda: EarlyStopping("train/loss"),
    "save": lambda: ModelCheckpoint(every_n_train_steps=2, save_last=True),
    "save the best": lambda: ModelCheckpoint(monitor="val_acc"),
    "save at an exception": lambda: ModelCheckpoint(save_on_exception=True),
    "accumulate": lambda: GradientAccumulationScheduler({0: 2, 1: 1}),
    "rates": lambda: LearningRateMonitor(),
    "average": lambda: StochasticWeightAveraging(1e-2),
    "time": lambda: Timer(timedelta(minutes=1)),
}
TRAINER: dict[str, list[Any]] = {
    "max_epochs": [0, 1, 3, None],
    "max_steps": [0, 1, 3],
    "min_epochs": [2],
    "accumulate_grad_batches": [0, 2, 3],
    "gradient_clip_val": [0.0, 0.5, -1.0, "much"],
    "gradient_clip_algorithm": ["norm", "value", "other"],
    "precision": ["64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "8"],
    "val_check_interval": [0, 1, 2, 0.5, 1.0, 1.5, 100],
    "check_val_every_n_epoch": [2, None],
    "limit_train_batches": [0, 1, 2, 0.0, 0.5, 1.5, -1],
    "limit_val_batches": [0, 1, 0.5],
    "overfit_batches": [1, 2, 0.5],
    "num_sanity_val_steps": [0, -1],
    "sync_batchnorm": [True],
    "fast_dev_run": [True, 2],
    "detect_anomaly": [True],
    "inference_mode": [False],
    "barebones": [True],
    "reload_dataloaders_every_n_epochs": [1],
    "log_every_n_steps": [0, 1],
    "use_distributed_sampler": [False],
    "deterministic": [True],
    "callbacks": [[name] for name in CALLBACKS] + [["save", "stop"], ["accumulate", "save the best"]],
}
STRATEGY: dict[str, list[Any]] = {
    "max_in_flight": [0, 1, 3],
    "exactness": ["bitwise", "summation", "nearly"],
    "memory_limit": ["1GiB", "1B", "much", -1, 0],
    "num_micro_batches": [0, 2],
    "schedule": ["gpipe", "other"],
    "split_backward": [True],
    "costs": ["missing.yaml", "missing.json"],
    "stall_timeout": [timedelta(0), None],
    "start_timeout": [timedelta(seconds=-1)],
}
PATHS = ["0", "1", "2", "3", "0.0", "1.1", "4", "nothing", "", "0.weight"]
MODULE: dict[str, list[Any]] = {
    "target_blocks": [["3"], ["nothing"], "3", [3]],
    "block_losses": [{"3": "kl"}, {"nothing": "mse"}, {"0": "nothing"}, {"0": nn.L1Loss()}, {"0": 3}],
    "width": [7],
    "on_nonfinite": ["skip", "never"],
}
PLANS = [
    *["0-3", "0-1|2-3", "0|1|2|3", "0,2|1,3", "0-1*2|2-3", "T0-3|S0-3", "joint", "", " ", "0-2", "3-0", "0-9", "a"],
    *[
        "0||1-3",
        "0-3|",
        "|",
        "-1",
        "0-1|1-3",
        "0-3*0",
        "0-3*x",
        "missing.yaml",
        "0-3 / 0-3",
        "T0-3",
        "0-1*1/2",
        "0.5|1",
    ],
    {},
    {"num_ranks": 2},
    {"num_ranks": 1, "teacher": [], "student": []},
    {"num_ranks": "x", "teacher": {}, "student": {}},
    {"num_ranks": 1, "teacher": [[[0, "1"]]] * 4, "student": [[[0, "1"]]] * 4},
    *[Plan.straight([2, 2]), Plan.joint(4, 2), Plan.straight([4]), 7, ["0-3"], None],
]


def _some(options: dict[str, list[Any]], most: int) -> st.SearchStrategy[dict[str, Any]]:
    def draw(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: st.sampled_from(options[name]) for name in names})

    return st.lists(st.sampled_from(sorted(options)), max_size=most, unique=True).flatmap(draw)


_MAPS = st.one_of(
    st.just({str(index): str(index) for index in range(4)}),
    st.dictionaries(st.sampled_from(PATHS), st.sampled_from(PATHS), max_size=4),
    st.sampled_from([None, [], ["0", "1", "2", "3"], "0-3", {0: 0, 1: 1}, {"0": None}, {"1": "0", "3": "3"}]),
)
_DATA = st.fixed_dictionaries(
    {
        "num_rows": st.sampled_from([8, 8, 7, 1, 0]),
        "batch_size": st.sampled_from([2, 3, 16, 1]),
        "kind": st.sampled_from(["plain", "plain", "stream", "list", "validation", "drop_last", "none"]),
    }
)
CONFIGURATIONS = st.fixed_dictionaries(
    {"trainer": _some(TRAINER, 3), "strategy": _some(STRATEGY, 1), "module": _some(MODULE, 1), "data": _DATA}
)


class Launched(Exception):  # noqa: N818  # no error
    """All was in order, as far as can be known before other processes start."""


class _Module(LinearModule):
    def __init__(self, block_map: Any, *, width: int = 6, **options: Any) -> None:
        def build(hidden: int) -> nn.Sequential:
            sizes = [(6, 6), (6, hidden), (hidden, 6)]
            return nn.Sequential(*(nn.Sequential(nn.Linear(*size), nn.Tanh()) for size in sizes), nn.Linear(6, 5))

        super(LinearModule, self).__init__(build(6), build(width), block_map, **options)


def fit(drawn: dict[str, Any], plan: Any, num_ranks: int, block_map: Any = None) -> None:
    """Build all of a drawn configuration, and train."""
    seed_everything(3, verbose=False)
    module = _Module(
        {str(index): str(index) for index in range(4)} if block_map is None else block_map, **drawn["module"]
    )
    options = {"max_epochs": 2, **drawn["trainer"]}
    options["callbacks"] = [CALLBACKS[name]() for name in options.get("callbacks", [])]
    has_saving = any(isinstance(callback, ModelCheckpoint) for callback in options["callbacks"])
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            accelerator="cpu",
            devices=num_ranks,
            strategy=PipeBDStrategy(plan=plan, **drawn["strategy"]),
            default_root_dir=directory,
            enable_checkpointing=has_saving,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, *_loaders(module, **drawn["data"]))


def _loaders(module: Any, *, num_rows: int, batch_size: int, kind: str) -> list[Any]:
    data = ToyData(num_rows, module.shape)
    if kind == "none":
        return [None]
    if kind == "list":
        return [
            [(data.inputs[start : start + batch_size], data.labels[:1]) for start in range(0, num_rows, batch_size)]
        ]
    if kind == "stream":
        return [DataLoader(ToyStream(data), batch_size=batch_size)]
    loader = DataLoader(data, batch_size=batch_size, drop_last=kind == "drop_last")
    return [loader, loader] if kind == "validation" else [loader]


def check_refusal(error: BaseException) -> None:
    """Accept an error that our code or Lightning's has raised on purpose, with a text.

    Raises:
        AssertionError: It is anything else, such as a failed look-up in the middle of our code.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = frame.filename.startswith(OURS)
    is_meant = (is_ours or frame.filename.startswith(LIGHTNING)) and "raise" in (frame.line or "")
    # A message of ours says what to do instead, in a second sentence at least.
    is_helpful = str(error).rstrip(".").count(". ") >= 1 or not is_ours
    # Lightning names a monitored key that is not logged by a plain RuntimeError.
    kinds = REFUSALS if is_ours else (*REFUSALS, RuntimeError)
    if not (isinstance(error, kinds) and is_meant and is_helpful):
        text = "".join(traceback.format_exception(error)[-4:])
        raise AssertionError(f"{type(error).__name__} is no refusal that helps:\n{text}") from error


def _quietly() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _options(num_examples: int) -> settings:
    return settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def try_alone(rank: int, num_examples: int, number: int) -> None:
    """Train drawn configurations in this one process."""
    _quietly()

    @seed(number)
    @_options(num_examples)
    @given(drawn=CONFIGURATIONS, plan=st.sampled_from(["0-3", "0-3", "joint", None]))
    def test(drawn: dict[str, Any], plan: Any) -> None:
        try:
            fit(drawn, plan, 1)
        except Exception as error:
            check_refusal(error)
        finally:
            torch.use_deterministic_algorithms(False)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    test()


def try_setup(rank: int, num_examples: int, number: int) -> None:
    """Build drawn models and plans for several ranks, up to where other processes would start."""
    _quietly()

    def launch(*args: Any) -> None:
        raise Launched

    launcher: Any = _PreflightLauncher
    launcher._call_children_scripts = launch
    # As a user starts it: nobody else has started processes.
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)

    @seed(number)
    @_options(num_examples)
    @given(drawn=CONFIGURATIONS, plan=st.sampled_from(PLANS), num_ranks=st.sampled_from([2, 4]), block_map=_MAPS)
    def test(drawn: dict[str, Any], plan: Any, num_ranks: int, block_map: Any) -> None:
        try:
            fit(drawn, plan, num_ranks, block_map)
        except Launched:
            pass
        except Exception as error:
            check_refusal(error)

    test()


def try_together(num_examples: int, number: int, *, timeout: float = 60.0) -> None:
    """Train drawn configurations in two processes."""

    @seed(number)
    @_options(num_examples)
    @given(drawn=CONFIGURATIONS, plan=st.sampled_from(["0-1|2-3", "joint", "T0-3|S0-3", None]))
    def test(drawn: dict[str, Any], plan: Any) -> None:
        try:
            ends = run_processes(2, _fit_rank, drawn, plan, timeout=timeout)
        except RankError as error:
            raise AssertionError(str(error)) from error
        assert ends == ["done"] * 2 or "refused" in ends, ends
        assert "done" not in ends or "refused" not in ends, ends

    test()


def _fit_rank(rank: int, drawn: dict[str, Any], plan: Any) -> str:
    _quietly()
    try:
        fit(drawn, plan, 2)
    except (TransportError, RelayError):
        # What a rank sees of one that was refused.
        return "echo"
    except Exception as error:
        check_refusal(error)
        return "refused"
    return "done"
