"""From what the user asked for to how a whole student is trained: given, or found from measured costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from lightning.pytorch import Trainer

from lightning_pipebd.automatic_plan import PlanFinder, gather_machines, make_bench, optimizers_to_measure
from lightning_pipebd.cost_tables import MeasurementCache
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.machines import Machine, find_cluster, find_memory
from lightning_pipebd.pipeline_measuring import coupled_blocks, measure_pipeline, one_replica_reason
from lightning_pipebd.pipeline_options import PipelineOptions, even_plan
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_explain import check_pipeline_exactness
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Durations, Schedule
from lightning_pipebd.runtime.agreement import done_by_rank_zero
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["FoundPipeline", "check_pipeline_request", "find_pipeline_of_fit"]


class FoundPipeline(NamedTuple):
    """How a whole student is trained.

    Args:
        plan: The plan.
        options: With nothing left to choose.
        durations: What the order of the work follows from.
        outlook: What is foreseen of it; `None` if nothing was measured.
    """

    plan: PipelinePlan
    options: PipelineOptions
    durations: Durations
    outlook: PipelineOutlook | None


def check_pipeline_request(
    finder: PlanFinder, options: PipelineOptions, module: TeacherStudentModule, num_ranks: int
) -> None:
    """Raise for what is known to be wrong before anything is measured.

    Raises:
        PlanError: Batches would be cut more finely than the exactness that was asked for allows.
        CostError: The costs are of another module.
        ValueError: Plans shall change between epochs, be tried, or teach ahead.
    """
    if finder.replans:
        raise ValueError(
            "`replan` must be left out for a TeacherStudentModule: the stages of a whole student do not move while it "
            "trains. Start anew from a checkpoint: the plan is found again."
        )
    if finder.trials:
        raise ValueError(
            "`trials` must be left out for a TeacherStudentModule: its plans are judged by predictions alone. Give a "
            "`plan` to compare it yourself."
        )
    if finder.may_teach_ahead:
        raise ValueError(
            "`teach_ahead` must be left out for a TeacherStudentModule: its teacher works on the next batch wherever a "
            "rank would wait. Set `max_in_flight` to say how far ranks may be apart."
        )
    costs = finder.costs
    if costs is not None:
        number = (module.num_teacher_blocks, module.num_student_blocks)
        if not isinstance(costs, PipelineMeasurement) or (len(costs.teacher), len(costs.student)) != number:
            raise CostError(
                f"`costs` must describe the {number[0]} teacher blocks and {number[1]} student blocks of this "
                "TeacherStudentModule, but describe other blocks. Measure this module."
            )
    if finder.exactness is None or (options.num_micro_batches is None and finder.given is None):
        return
    given = options.given_plan(finder.given, module, num_ranks)
    replicas = 1 if given is None else given.replicas
    number_of_parts = options.settled(module, num_ranks // replicas, finder.exactness).num_micro_batches
    assert number_of_parts is not None
    check_pipeline_exactness(number_of_parts, coupled_blocks(module), finder.exactness, replicas=replicas)


def find_pipeline_of_fit(
    strategy: ProcessGroupStrategy,
    finder: PlanFinder,
    options: PipelineOptions,
    trainer: Trainer,
    module: TeacherStudentModule,
    transport: Transport,
) -> FoundPipeline:
    """**Collective** over all ranks: give how the fit that is being set up is to train; measure if that is needed.

    Raises:
        PlanError: Nothing fits the memory, or the given plan does not.
    """
    num_ranks = transport.num_ranks
    given = options.given_plan(finder.given, module, num_ranks)
    in_a_pipeline = num_ranks if given is None else given.ranks_per_replica
    settled = options.settled(module, in_a_pipeline, finder.exactness)
    if given is not None and finder.costs is None and finder.memory_limit is None:
        return FoundPipeline(given, settled, settled.durations(module), None)
    machines = gather_machines(strategy, transport)
    measurement = _measurement(strategy, finder, trainer, module, transport, machines)
    if measurement is None:
        # Nothing to train on: Lightning will say so.
        return FoundPipeline(given or even_plan(module, num_ranks), settled, settled.durations(module), None)
    memory = find_memory(transport, strategy.root_device, machines, finder.memory_limit)
    cluster = find_cluster(machines, memory)
    if given is None:
        look = partial(_find_best, finder, options, measurement, cluster)
    else:
        candidate = PipelineCandidate(given, settled.num_micro_batches or 1, Schedule(settled.schedule))
        look = partial(_foresee, finder, options, measurement, cluster, candidate)
    outlook = done_by_rank_zero(transport, look)
    chosen = outlook.candidate
    settled = replace(options, num_micro_batches=chosen.num_micro_batches, schedule=str(chosen.schedule))
    return FoundPipeline(chosen.plan, settled, outlook.durations, outlook)


def _find_best(
    finder: PlanFinder, options: PipelineOptions, measurement: PipelineMeasurement, cluster: Cluster
) -> PipelineOutlook:
    return PipelineOutlook.find(
        measurement,
        cluster,
        exactness=finder.exactness,
        num_micro_batches=options.num_micro_batches,
        schedule=options.schedule,
        splits_backward=options.split_backward,
        max_in_flight=finder.max_in_flight,
    )


def _foresee(
    finder: PlanFinder,
    options: PipelineOptions,
    measurement: PipelineMeasurement,
    cluster: Cluster,
    candidate: PipelineCandidate,
) -> PipelineOutlook:
    outlook = PipelineOutlook(
        candidate=candidate,
        measurement=measurement,
        cluster=cluster,
        splits_backward=options.split_backward,
        max_in_flight=finder.max_in_flight,
    )
    outlook.check_memory()
    return outlook


def _measurement(
    strategy: ProcessGroupStrategy,
    finder: PlanFinder,
    trainer: Trainer,
    module: TeacherStudentModule,
    transport: Transport,
    machines: Sequence[Machine],
) -> PipelineMeasurement | None:
    looks_ahead = PipelineOptions().looks_ahead(module)
    if isinstance(finder.costs, PipelineMeasurement):
        # What the module is counts, not what the file says of it.
        return replace(
            finder.costs,
            looks_ahead=looks_ahead,
            has_momentum=module.momentum is not None,
            is_full_batch=module.full_batch_loss,
            coupled_blocks=tuple(coupled_blocks(module)),
            one_replica_reason=one_replica_reason(module),
        )
    return measure_pipeline(
        make_bench(strategy, trainer, module, transport),
        optimizers_to_measure(strategy, trainer, module),
        machines,
        num_ranks=transport.num_ranks,
        looks_ahead=looks_ahead,
        cache=MeasurementCache(),
    )
