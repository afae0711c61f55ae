"""A module of a configuration file, measured in this process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

from lightning_pipebd.bench import Bench
from lightning_pipebd.cost_tables import MeasurementCache
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.machines import Machine
from lightning_pipebd.measuring import measure_module
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.pipeline_measuring import measure_pipeline
from lightning_pipebd.pipeline_options import PipelineOptions
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.session_choice import require_module
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["measure_configured"]

ModuleT = TypeVar("ModuleT", bound=DistillationModule)

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
        self.measurement: Measurement | PipelineMeasurement | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        machines = [Machine.here(strategy.root_device, 0)]
        module = require_module(pl_module)
        if isinstance(module, TeacherStudentModule):
            self.measurement = measure_pipeline(
                _bench(trainer, module),
                trainer.optimizers,
                machines,
                num_ranks=self._num_ranks,
                looks_ahead=PipelineOptions().looks_ahead(module),
                cache=self._cache,
            )
            return
        assert isinstance(module, BlockwiseDistillationModule)
        self.measurement = measure_module(
            _bench(trainer, module), trainer.optimizers, machines, num_ranks=self._num_ranks, cache=self._cache
        )


def _bench(trainer: Trainer, module: ModuleT) -> Bench[ModuleT]:
    strategy = trainer.strategy
    return Bench(
        trainer=trainer,
        module=module,
        transport=LocalWorld(1).transports[0],
        plugin=trainer.precision_plugin,
        device=strategy.root_device,
        to_device=strategy.batch_to_device,
        is_synchronised=False,
        tell=logging.getLogger("lightning.pytorch").info,
    )


def measure_configured(
    arguments: Sequence[str], *, num_ranks: int, uses_cache: bool
) -> Measurement | PipelineMeasurement:
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
