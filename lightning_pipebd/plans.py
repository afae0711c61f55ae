"""Plans from what users write: text, YAML files or dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.plan import Plan, PlanError
from lightning_pipebd.planning.plan_text import parse_plan

__all__ = ["load_plan", "resolve_plan", "save_plan"]

_SUFFIXES = (".yaml", ".yml")


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a YAML file that :func:`save_plan` or a user has written.

    Raises:
        PlanError: The file does not exist, is no YAML, or does not describe a plan.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise PlanError(f"`plan` must name a readable YAML file, but {path} is not: {error}") from error
    return parse_plan(data) if isinstance(data, str) else _from_dict(data, str(path))


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan to a YAML file."""
    Path(path).write_text(yaml.safe_dump(plan.to_dict(), sort_keys=False), encoding="utf-8")


def resolve_plan(plan: str | dict[str, Any] | Plan, module: BlockwiseDistillationModule, num_ranks: int) -> Plan:
    """Make a plan for a module of what the user gave, and check that it fits the module and the ranks.

    Args:
        plan: A :class:`Plan`; its text form; ``"joint"``; the path of a YAML file; or its dictionary form.
        module: Whose blocks are planned.
        num_ranks: Ranks of the run.

    Raises:
        PlanError: The plan is none, or is for another number of blocks or ranks.
        TypeError: The plan is given as something else.
    """
    if not isinstance(plan, (Plan, dict, str)):
        raise TypeError(
            f"`plan` must be text, a dictionary or a Plan, but is {plan!r}. Write for example plan='0-1|2-3', or leave "
            "it out for an automatic one."
        )
    if isinstance(plan, Plan):
        resolved = plan
    elif isinstance(plan, dict):
        resolved = _from_dict(plan, "the dictionary")
    elif plan.strip() == "joint":
        resolved = Plan.joint(module.num_blocks, num_ranks)
    elif plan.endswith(_SUFFIXES):
        resolved = load_plan(plan)
    else:
        resolved = parse_plan(plan, num_blocks=module.num_blocks)
    if resolved.num_blocks != module.num_blocks:
        raise PlanError(
            f"`plan` must cover the module's {module.num_blocks} blocks, but covers {resolved.num_blocks}. "
            f"The blocks are {', '.join(module.block_pairs.names)}."
        )
    if resolved.num_ranks != num_ranks:
        raise PlanError(
            f"`plan` must be for the {num_ranks} ranks of this run, but is for {resolved.num_ranks}. "
            f"Set `devices={resolved.num_ranks}` (times `num_nodes`), or give another plan."
        )
    return resolved


def _from_dict(data: Any, where: str) -> Plan:
    if not isinstance(data, dict):
        raise PlanError(
            f"`plan` must be a mapping with `num_ranks`, `teacher` and `student`, but {where} holds {data!r}"
        )
    return Plan.from_dict(data)
