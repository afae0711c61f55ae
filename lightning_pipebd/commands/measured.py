"""A module of a configuration file, measured in this process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

from lightning_pipebd.cost_tables import MeasurementCache
from lightning_pipebd.machines import Machine
from lightning_pipebd.measuring import Bench, measure_module
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.preflight import require_module
from lightning_pipebd.runtime.local_transport import LocalWorld

__all__ = ["measure_configured"]

#: What a plan is measured without: other processes, and everything that a run leaves behind.
_OVERRIDES = (
    *("--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.max_steps=0"),
    *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.enable_model_summary=false"),
)


class _Meter(Callback):
    """Measures when everything is set up and nothing has been trained."""

    def __init__(self, num_ranks: int, cache: MeasurementCache | None) -> None:
        self._num_ranks = num_ranks
        self._cache = cache
        self.measurement: Measurement | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        bench = Bench(
            trainer=trainer,
            module=require_module(pl_module),
            transport=LocalWorld(1).transports[0],
            plugin=trainer.precision_plugin,
            device=strategy.root_device,
            to_device=strategy.batch_to_device,
            is_synchronised=False,
            tell=logging.getLogger("lightning.pytorch").info,
        )
        machine = Machine.here(strategy.root_device, 0)
        self.measurement = measure_module(
            bench, trainer.optimizers, [machine], num_ranks=self._num_ranks, cache=self._cache
        )


def measure_configured(arguments: Sequence[str], *, num_ranks: int, uses_cache: bool) -> Measurement:
    """Measure the module and the data that a configuration describes, with its precision, in this process.

    Args:
        arguments: What `pipebd fit` would be given: `--config`, `--model`, ...
        num_ranks: Ranks for which plans will be sought.
        uses_cache: Whether costs that were measured before may be used.

    Raises:
        ValueError: There is nothing to measure on.
    """
    meter = _Meter(num_ranks, MeasurementCache() if uses_cache else None)
    defaults: dict[str, Any] = {"callbacks": [meter]}
    with warnings.catch_warnings():
        # These are arguments of the command line, less those that are this command's own.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        LightningCLI(
            args=["fit", *arguments, *_OVERRIDES],
            trainer_defaults=defaults,
            save_config_callback=None,
            parser_kwargs={"prog": "pipebd plan"},
        )
    if meter.measurement is None:
        raise ValueError("`data` must yield a batch to measure on, but yields none.")
    return meter.measurement
