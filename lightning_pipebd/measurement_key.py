"""The key of a measurement in the cache: everything that costs depend on, as far as it can be named."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["measurement_key"]


def measurement_key(
    module: DistillationModule,
    batch: Any,
    optimizers: Sequence[Optimizer],
    plugin: Precision,
    *,
    machines: Sequence[tuple[Any, ...]],
    num_ranks: int,
    is_synchronised: bool,
) -> Mapping[str, Any]:
    """Name a measurement.

    Args:
        module: The module; its structure and its code count, its weights do not.
        batch: Inputs and labels; their shapes and types count.
        optimizers: The user's; their kinds and switches count, their learning rates do not.
        plugin: The trainer's precision plugin.
        machines: Of every rank, its device, its node, its threads, and how many ranks share the device.
        num_ranks: Ranks for which numbers of rows were chosen.
        is_synchronised: Whether shared blocks take their batch statistics over all rows.
    """
    tensors = [
        (name, tuple(value.shape), str(value.dtype), value.requires_grad)
        for model in (module.teacher, module)
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    ]
    options = [
        (type(optimizer).__qualname__, len(group["params"]), [item for item in group.items() if _is_option(item[1])])
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return {
        "versions": [torch.__version__, lightning.__version__, platform.python_version()],
        **_describe_blocks(module),
        "models": [str(module.teacher), str(module)],
        "sources": _sources(module),
        "tensors": tensors,
        "batch": str(pytree.tree_map_only(Tensor, lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), batch)),
        "machines": [list(machine) for machine in machines],
        "ranks": num_ranks,
        "precision": [type(plugin).__qualname__, str(plugin.precision)],
        "optimizers": options,
        "synchronised": is_synchronised,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _describe_blocks(module: DistillationModule) -> dict[str, Any]:
    if isinstance(module, BlockwiseDistillationModule):
        options = module.compile_options
        return {
            "blocks": module.block_pairs.paths,
            "targets": sorted(module.target_blocks),
            "momentum": module.block_momentum is not None,
            "compile": None if options is None else sorted(map(repr, options.items())),
        }
    assert isinstance(module, TeacherStudentModule)
    cuts = module.cuts
    return {
        "blocks": [[*side.parameter_names, *side.buffer_names] for side in (cuts.teacher, cuts.student)],
        "views": module.has_views,
        "momentum": [module.momentum is not None, module.teacher_delay],
        "full_batch": module.full_batch_loss,
    }


def _is_option(value: Any) -> bool:
    # A learning rate changes no time.
    return value is None or isinstance(value, (bool, str))


def _sources(module: DistillationModule) -> list[str]:
    """Give the code of the user's classes: a changed `forward` or loss takes another time."""
    classes = {type(part) for model in (module.teacher, module) for part in model.modules()}
    found = []
    for kind in sorted(classes, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        if kind.__module__.split(".")[0] in ("torch", "torchvision", "lightning", "torchmetrics"):
            continue
        try:
            found.append(inspect.getsource(kind))
        except (OSError, TypeError):
            found.append(kind.__qualname__)
    return found
