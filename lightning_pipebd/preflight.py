"""What can be known to be wrong before a second process exists: each with the reason and the way out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn

from lightning_pipebd.fit_callbacks import user_callbacks
from lightning_pipebd.lightning_internals.trainer import validates_by_time
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.other_lightning import check_origin
from lightning_pipebd.planning.explain import Exactness, exactness_of
from lightning_pipebd.planning.plan import Plan

__all__ = [
    "check_accumulation",
    "check_callbacks",
    "check_optimizers",
    "check_schedulers",
    "check_trainer",
    "require_module",
    "warn_of_statistics",
]

_STEP_KEYS = re.compile(r"train/loss|train/block/(\d+|.+/candidate/\d+)/loss")
_COUPLING_OPTIMIZERS = (torch.optim.LBFGS,)


def require_module(module: LightningModule | None) -> BlockwiseDistillationModule:
    """Give the module as ours.

    Raises:
        TypeError: It is another kind of module, or one that trains by itself.
    """
    if not isinstance(module, BlockwiseDistillationModule):
        msg = (
            f"`strategy='pipebd'` must train a BlockwiseDistillationModule, but got {type(module).__name__}. Subclass "
            "lightning_pipebd.BlockwiseDistillationModule, or use another strategy."
        )
        raise TypeError(msg)
    return module


def check_trainer(trainer: Trainer, module: BlockwiseDistillationModule, plan: Plan | None) -> None:
    """Raise for settings that cannot work, warn of those that cost speed; `None` is a plan yet to be found.

    Raises:
        TypeError: The module overrides ``training_step``.
        ValueError: A setting or callback cannot work; the message says why and what to do instead.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if type(module).training_step is not BlockwiseDistillationModule.training_step:
        msg = (
            f"`{type(module).__name__}` must leave `training_step` alone, because blocks learn at different times on "
            "different ranks. Override `block_loss` or `unpack_batch`; log more in callbacks."
        )
        raise TypeError(msg)
    if not module.automatic_optimization:
        raise ValueError("`automatic_optimization` must be True: the plan decides when a block learns. Leave it on.")
    own = BlockwiseDistillationModule.configure_gradient_clipping
    if trainer.gradient_clip_val and type(module).configure_gradient_clipping is not own:
        warnings.warn(
            f"`{type(module).__name__}.configure_gradient_clipping` sees the gradients of one rank's blocks only: what "
            "it computes over several blocks depends on the plan. Clip block by block, as the overridden method does.",
            stacklevel=2,
        )
    if validates_by_time(trainer):
        msg = (
            "`val_check_interval` must count batches, but is a time: ranks are at different batches at one time, and "
            "must validate after the same one. Give a number of batches or a fraction of an epoch."
        )
        raise ValueError(msg)
    check_callbacks(trainer)
    _check_momentum(trainer, module, plan)
    if plan is not None:
        _check_batch_norm(trainer, module, plan)
    if module.example_input_array is not None:
        module.check_shapes(module.example_input_array)


def check_accumulation(trainer: Trainer) -> None:
    """Raise for a number of batches that Lightning would divide by.

    Raises:
        ValueError: ``accumulate_grad_batches`` is below 1.
    """
    if trainer.accumulate_grad_batches < 1:
        msg = f"`accumulate_grad_batches` must be at least 1, but is {trainer.accumulate_grad_batches}. Leave it out."
        raise ValueError(msg)


def _check_momentum(trainer: Trainer, module: BlockwiseDistillationModule, plan: Plan | None) -> None:
    if module.block_momentum is None:
        return
    if plan is not None:
        module.block_momentum.check_plan(plan)
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        msg = (
            "`precision` must not be '16-mixed' for a teacher with `momentum`: it would follow a block whose update "
            "the loss scaler skipped. Use 'bf16-mixed'."
        )
        raise ValueError(msg)


def check_callbacks(trainer: Trainer) -> None:
    """Raise for callbacks that cannot work, warn of those that cost speed.

    Called again when the module has added its own (``configure_callbacks``), which is after the other processes start.

    Raises:
        TypeError: A callback is one of `pytorch_lightning`.
        ValueError: A callback cannot work; the message says why and what to do instead.
    """
    check_origin(user_callbacks(trainer), "callbacks")
    for callback in user_callbacks(trainer):
        if refusal := _refusal(callback):
            raise ValueError(refusal)
        _warn_of_waiting(callback)


def _refusal(callback: object) -> str | None:
    """Say why a callback cannot work; ``None`` if it can."""
    name = type(callback).__name__
    if isinstance(callback, (StochasticWeightAveraging, *_weight_averaging())):
        return (
            f"`{name}` must see all weights after every step, but each rank updates its own blocks only. "
            "Average the checkpoints afterwards."
        )
    if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
        return (
            f"`{name}` must judge the training by the whole loss, but a rank has only that of its own blocks. "
            "Run it with `strategy='auto'`."
        )
    if isinstance(callback, BaseFinetuning):
        return (
            f"`{name}` must not give the optimizer parameters while it trains: each rank has pruned it to its blocks. "
            "Name all parameters in `configure_optimizers`, and let a schedule keep the learning rate of some at 0."
        )
    if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
        return (
            f"`{name}` must not save after an exception: the other ranks' blocks are out of reach then. "
            "Use `every_n_train_steps`."
        )
    monitor = getattr(callback, "monitor", None)
    if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and monitor and _STEP_KEYS.fullmatch(monitor):
        return (
            f"`monitor` of {name} must be known on every rank, but {monitor!r} is a step's loss. "
            f"Monitor {monitor + '_epoch'!r}."
        )
    return None


def _warn_of_waiting(callback: object) -> None:
    name = type(callback).__name__
    if getattr(callback, "_train_time_interval", None) is not None:
        warnings.warn(
            f"`{name}(train_time_interval=...)` makes all ranks wait for each other at every batch. "
            "Use `every_n_train_steps`.",
            stacklevel=2,
        )
    if isinstance(callback, Timer) and getattr(callback, "_interval", "step") == "step":
        warnings.warn(
            "`max_time` and `Timer(interval='step')` make all ranks wait for each other at every batch. "
            "Use the callback `Timer(interval='epoch')`.",
            stacklevel=2,
        )


def _weight_averaging() -> tuple[type, ...]:
    # Not in the oldest Lightning that we support.
    import lightning.pytorch.callbacks as callbacks

    found = getattr(callbacks, "WeightAveraging", None)
    return (found,) if found else ()


def _check_batch_norm(trainer: Trainer, module: BlockwiseDistillationModule, plan: Plan) -> None:
    split = [block for block in range(plan.num_blocks) if len(plan.student_ranks(block)) > 1]
    traits = module.block_pairs.traits()
    names = [traits[block].name for block in split if traits[block].has_batch_statistics]
    strategy = trainer.strategy
    if names and getattr(strategy, "layer_sync", False) and strategy.root_device.type == "cpu":
        msg = (
            f"`sync_batchnorm` must run on GPUs (torch has no synchronised BatchNorm for CPU), but blocks "
            f"{', '.join(names)} are shared by ranks on CPU. Use a plan that keeps each of them on one rank."
        )
        raise ValueError(msg)


def warn_of_statistics(plan: Plan, module: BlockwiseDistillationModule, *, is_synchronised: bool) -> None:
    """Warn if a plan changes the mathematics of a block."""
    traits = module.block_pairs.traits(is_synchronised=is_synchronised)
    if exactness_of(plan, traits) is not Exactness.STATISTICS:
        return
    names = [
        trait.name
        for block, trait in enumerate(traits)
        if len(plan.student_ranks(block)) > 1
        and (trait.is_stochastic or (trait.has_batch_statistics and not trait.is_synchronised))
    ]
    warnings.warn(
        f"The plan splits the rows of student blocks {', '.join(names)} over ranks, and these blocks use batch "
        "statistics or random numbers: they train a little differently than on one process (exactness: statistics). "
        "Keep each on one rank, or set `sync_batchnorm=True` on GPUs.",
        stacklevel=2,
    )


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], module: BlockwiseDistillationModule) -> None:
    """Raise for optimizers that cannot be divided by blocks, warn of parameters that will not be trained as meant.

    Raises:
        ValueError: An optimizer couples blocks, or trains the teacher.
    """
    teacher = {id(parameter) for parameter in module.teacher.parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, _COUPLING_OPTIMIZERS):
            msg = (
                f"`configure_optimizers` must not return {type(optimizer).__name__}: its step couples all parameters, "
                "and blocks step by themselves. Use an optimizer that treats parameters one by one (SGD, AdamW, ...)."
            )
            raise ValueError(msg)
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if parameters & teacher:
            raise ValueError("`configure_optimizers` must leave the teacher's parameters out: it is frozen.")
        _warn_of_idle(parameters, module)
        _warn_of_strangers(parameters, module)


def _warn_of_idle(parameters: set[int], module: BlockwiseDistillationModule) -> None:
    def is_idle(candidates: Iterable[nn.Parameter]) -> bool:
        trained = [parameter for parameter in candidates if parameter.requires_grad]
        return bool(trained) and not parameters & {id(parameter) for parameter in trained}

    idle = [
        f"block {name}"
        for block, name in enumerate(module.block_pairs.names)
        if is_idle(module.block_parameters(block))
    ]
    idle += [f"adapter {name}" for name, adapter in module.adapters.items() if is_idle(adapter.parameters())]
    if idle:
        warnings.warn(
            f"The optimizer has no parameter of {', '.join(idle)}: they will not change. "
            "Give it `self.trainable_parameters()`.",
            stacklevel=2,
        )


def _warn_of_strangers(parameters: set[int], module: BlockwiseDistillationModule) -> None:
    of_blocks = {id(parameter) for parameter in [*module.student.parameters(), *module.adapters.parameters()]}
    strangers = [name for name, parameter in module.named_parameters() if id(parameter) in parameters - of_blocks]
    if strangers:
        warnings.warn(
            f"The optimizer has parameters that belong to no block: {', '.join(strangers[:3])}. Under a plan only the "
            "blocks of rank 0 train them. Make them part of an adapter, or give the optimizer "
            "`self.trainable_parameters()`.",
            stacklevel=2,
        )


def check_schedulers(configs: Iterable[LRSchedulerConfig]) -> None:
    """Raise for schedulers that follow what only one rank knows.

    Raises:
        ValueError: A scheduler follows the loss of a step at every step.
    """
    for config in configs:
        monitor = config.monitor or ""
        if config.reduce_on_plateau and config.interval == "step" and _STEP_KEYS.fullmatch(monitor):
            msg = (
                f"`monitor` of {type(config.scheduler).__name__} must be known on every rank, but {monitor!r} "
                f"is a step's loss. Monitor {monitor + '_epoch'!r} with `interval: epoch`."
            )
            raise ValueError(msg)
