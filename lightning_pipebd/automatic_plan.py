"""From what the user asked for to the plan of a fit: given, or found from measured costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_pipebd.ahead_watch import check_may_teach_ahead
from lightning_pipebd.bench import Bench
from lightning_pipebd.cost_tables import MeasurementCache, load_measurement
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.lightning_internals.module import set_device
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.lightning_internals.trainer import without_train_loader
from lightning_pipebd.machines import Machine, find_cluster, find_memory
from lightning_pipebd.measuring import block_traits, count_batch_rows, measure_module
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.explain import Exactness, explain_plan
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook, check_exactness
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.plan import Plan, PlanError
from lightning_pipebd.planning.quantities import parse_bytes
from lightning_pipebd.plans import resolve_plan
from lightning_pipebd.runtime.agreement import done_by_rank_zero
from lightning_pipebd.runtime.side_effects import preserved_random_states, untouched
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.trials import try_plans

__all__ = [
    "FoundPlan",
    "PlanFinder",
    "UnreadLoader",
    "explain_found",
    "find_plan_of_fit",
    "gather_machines",
    "make_bench",
    "optimizers_to_measure",
]

ModuleT = TypeVar("ModuleT", bound=DistillationModule)
_LEVELS = (Exactness.BITWISE, Exactness.SUMMATION)


class FoundPlan(NamedTuple):
    """The plan of a fit.

    Args:
        plan: The plan.
        outlook: What is foreseen of it; `None` if nothing was measured.
    """

    plan: Plan
    outlook: Outlook | None


class UnreadLoader:
    """Stands for the user's loader while nothing may be loaded: tells its length, and yields nothing."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class PlanFinder:
    """Knows what the user said about the plan, and finds what was left open.

    Args:
        plan: What the user gave; `None` to have one found.
        exactness: Class of exactness that the plan must have at least; `None` for `"summation"`.
        memory_limit: Bytes that each rank may use.
        costs: Costs to use instead of measuring.
        max_in_flight: Steps by which a rank may run ahead.
        trials: Plans to try before one is chosen, where predictions cannot decide; 0 tries none.
        replan: `"epoch"` to look for a better plan at the end of every epoch; `None` to keep the plan.

    Raises:
        ValueError: An option has no such value.

    Attributes:
        replans: Whether the plan may change between epochs.
        given: What the user gave as the plan.
        costs: What the user gave as the costs, read if it was a file.
        exactness: The class of exactness that is asked for; `None` without.
        memory_limit: Bytes that each rank may use; `None` without.
        trials: Plans to try.
        max_in_flight: Steps by which a rank may run ahead.
        may_teach_ahead: Whether a plan that is found may have the teacher work one batch ahead.
    """

    def __init__(
        self,
        plan: str | dict[str, Any] | Plan | PipelinePlan | None,
        *,
        exactness: str | None,
        memory_limit: str | int | None,
        costs: str | CostTable | Measurement | PipelineMeasurement | None,
        max_in_flight: int,
        replan: str | None = None,
        trials: int = 0,
        may_teach_ahead: bool = False,
    ) -> None:
        if exactness is not None and exactness not in [level.value for level in _LEVELS]:
            raise ValueError(
                f"`exactness` must be 'bitwise' or 'summation', but is {exactness!r}. A plan that changes the "
                "statistics of a block is never chosen; give such a plan yourself."
            )
        if replan not in (None, "epoch"):
            raise ValueError(f"`replan` must be 'epoch' or None, but is {replan!r}. Choose one of them.")
        if trials < 0 or trials == 1:
            raise ValueError(f"`trials` must be 0, or at least 2 plans to compare, but is {trials}. Use 3, or 0.")
        if may_teach_ahead and plan is not None:
            raise ValueError(
                "`teach_ahead` must be left out where `plan` is given, because a plan says so itself. Write it there: "
                "`ahead 0,2|1,3`."
            )
        self.may_teach_ahead = may_teach_ahead
        self.replans = replan is not None
        self.trials = trials
        self.given = plan
        self.exactness = None if exactness is None else Exactness(exactness)
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit, "memory_limit")
        self.costs = load_measurement(costs) if isinstance(costs, (str, Path)) else costs
        self.max_in_flight = max_in_flight

    def given_plan(self, module: BlockwiseDistillationModule, num_ranks: int) -> Plan | None:
        """Give the plan as far as it is known without measuring.

        Raises:
            PlanError: The given plan does not fit the module or the ranks.
        """
        if isinstance(self.given, PipelinePlan):
            raise PlanError("`plan` must be a Plan, but a PipelinePlan is for a TeacherStudentModule. Write its text.")
        if self.given is not None:
            return resolve_plan(self.given, module, num_ranks)
        # One rank leaves no choice.
        return Plan.straight([module.num_blocks]) if num_ranks == 1 else None

    def check(self, plan: Plan | None, module: BlockwiseDistillationModule, strategy: ProcessGroupStrategy) -> None:
        """Raise for what is known to be wrong before anything is measured.

        Raises:
            PlanError: The given plan is less exact than was asked for.
            CostError: The costs are of another number of blocks.
            ValueError: The teacher shall work one batch ahead, and must not.
        """
        if isinstance(self.costs, PipelineMeasurement):
            raise CostError(
                "`costs` must be of blocks that learn by themselves, but are of a whole student. Measure this module."
            )
        if isinstance(self.costs, (CostTable, Measurement)):
            table = self.costs.costs if isinstance(self.costs, Measurement) else self.costs
            if table.num_blocks != module.num_blocks:
                raise CostError(
                    f"`costs` must describe the module's {module.num_blocks} blocks, but describe {table.num_blocks}. "
                    "Measure this module."
                )
        if self.may_teach_ahead or (plan is not None and plan.teaches_ahead):
            check_may_teach_ahead(module)
        if plan is not None and self.exactness is not None:
            traits = block_traits(module, is_synchronised=_synchronises_norms(strategy))
            check_exactness(plan, traits, self.exactness)

    def find(
        self,
        bench: Bench[BlockwiseDistillationModule],
        machines: Sequence[Machine],
        make_optimizers: Callable[[], Sequence[Optimizer]],
    ) -> FoundPlan:
        """**Collective** over all ranks: give the plan, the same on every rank; measure if that is needed.

        Args:
            bench: What to measure with.
            machines: Of every rank.
            make_optimizers: Makes the user's optimizers, for measuring only.

        Raises:
            PlanError: Nothing fits the memory, or the given plan does not.
        """
        given = self.given_plan(bench.module, len(machines))
        if given is not None and self.costs is None and self.memory_limit is None and not self.replans:
            return FoundPlan(given, None)
        measurement = self._measure(bench, machines, make_optimizers)
        if measurement is None:
            # Nothing to train on: Lightning will say so.
            return FoundPlan(given or Plan.straight([bench.module.num_blocks, *[0] * (len(machines) - 1)]), None)
        memory = find_memory(bench.transport, bench.device, machines, self.memory_limit)
        cluster = _fitting_cluster(find_cluster(machines, memory), measurement.costs)
        outlook = done_by_rank_zero(bench.transport, lambda: self._look(given, measurement, cluster))
        outlook = try_plans(bench, outlook, self.trials)
        return FoundPlan(outlook.plan, outlook)

    def _look(self, given: Plan | None, measurement: Measurement, cluster: Cluster) -> Outlook:
        if given is not None:
            outlook = Outlook(
                plan=given,
                measurement=measurement,
                cluster=cluster,
                max_in_flight=self.max_in_flight,
                exactness_wanted=self.exactness,
            )
            outlook.check_memory()
            return outlook
        return Outlook.find(
            measurement,
            cluster,
            exactness=self.exactness,
            max_in_flight=self.max_in_flight,
            may_teach_ahead=self.may_teach_ahead,
        )

    def _measure(
        self,
        bench: Bench[BlockwiseDistillationModule],
        machines: Sequence[Machine],
        make_optimizers: Callable[[], Sequence[Optimizer]],
    ) -> Measurement | None:
        if self.costs is None:
            return measure_module(bench, make_optimizers(), machines, num_ranks=len(machines), cache=MeasurementCache())
        module = bench.module
        if isinstance(self.costs, CostTable):
            num_rows = count_batch_rows(bench)
            known = None if num_rows is None else Measurement(costs=self.costs, num_rows=num_rows)
        else:
            assert isinstance(self.costs, Measurement)
            known = self.costs
        # What the module is counts, not what the file says of it.
        traits = tuple(block_traits(module, is_synchronised=bench.is_synchronised))
        return known and replace(
            known,
            traits=traits,
            target_blocks=tuple(module.target_blocks),
            has_momentum=module.block_momentum is not None,
        )


def _fitting_cluster(cluster: Cluster, costs: CostTable) -> Cluster:
    """Take costs that were measured on one class of devices for those of all ranks."""
    known = [device.device_class for device in costs.devices]
    if len(known) > 1 or all(name in known for name in cluster.device_class):
        return cluster
    return replace(cluster, device_class=(known[0],) * cluster.num_ranks)


def explain_found(found: FoundPlan, module: BlockwiseDistillationModule, *, is_synchronised: bool) -> str:
    """Say what a fit's plan does, and what is foreseen of it."""
    if found.outlook is not None:
        return str(found.outlook)
    traits = module.block_pairs.traits(module.example_input_array, is_synchronised=is_synchronised)
    has_momentum = module.block_momentum is not None
    return explain_plan(found.plan, traits, target_blocks=module.target_blocks, has_momentum=has_momentum)


def _synchronises_norms(strategy: ProcessGroupStrategy) -> bool:
    # torch has no synchronised BatchNorm for CPU.
    return strategy.layer_sync and strategy.root_device.type != "cpu"


def make_bench(
    strategy: ProcessGroupStrategy, trainer: Trainer, module: ModuleT, transport: Transport
) -> Bench[ModuleT]:
    """Give the bench of a fit that is being set up."""
    return Bench(
        trainer=trainer,
        module=module,
        transport=transport,
        plugin=strategy.precision_plugin,
        device=strategy.root_device,
        to_device=strategy.batch_to_device,
        is_synchronised=_synchronises_norms(strategy),
        tell=rank_zero_info,
    )


def gather_machines(strategy: ProcessGroupStrategy, transport: Transport) -> list[Machine]:
    """**Collective** over all ranks: describe what every rank computes on."""
    own = Machine.here(strategy.root_device, strategy.node_rank, devices=strategy.parallel_devices or ())
    return [Machine(*machine) for machine in transport.all_gather_object(tuple(own))]


def optimizers_to_measure(
    strategy: ProcessGroupStrategy, trainer: Trainer, module: DistillationModule
) -> list[Optimizer]:
    """Make the user's optimizers for measuring only; those for training are made later, and heard then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_device(module, strategy.root_device)
        with preserved_random_states(), untouched((), alone=[module]), without_train_loader(trainer):
            ProcessGroupStrategy.setup_optimizers(strategy, trainer)
    optimizers, strategy.optimizers, strategy.lr_scheduler_configs = strategy.optimizers, [], []
    return optimizers


def find_plan_of_fit(
    strategy: ProcessGroupStrategy,
    finder: PlanFinder,
    trainer: Trainer,
    module: BlockwiseDistillationModule,
    transport: Transport,
) -> FoundPlan:
    """**Collective** over all ranks: give the plan of a fit that is being set up."""
    bench = make_bench(strategy, trainer, module, transport)
    machines = gather_machines(strategy, transport)
    return finder.find(bench, machines, lambda: optimizers_to_measure(strategy, trainer, module))
