"""Measuring a whole student, its teacher and their loss: one table of the findings of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_pipebd.bench import (
    Bench,
    TimedNews,
    bring_first_batch,
    limited_noise,
    measure_all_links,
    recall_or_measure,
    refuse_iterator,
)
from lightning_pipebd.cost_tables import MeasurementCache
from lightning_pipebd.first_batch import FirstBatch
from lightning_pipebd.loop_costs import measure_loop
from lightning_pipebd.machines import Machine
from lightning_pipebd.measurement_key import measurement_key
from lightning_pipebd.pipeline_jobs import PipelineBlockJobs
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement, StudentBlockCosts, TeacherBlockCosts
from lightning_pipebd.runtime.agreement import done_by_all, done_by_rank_zero
from lightning_pipebd.runtime.link_probe import Links
from lightning_pipebd.runtime.optimizer_costs import measure_follow, measure_updates
from lightning_pipebd.runtime.partition import Partition, has_batch_statistics, is_stochastic
from lightning_pipebd.runtime.pipeline_profiler import PipelineParts, PipelineProfile, PipelineProfiler
from lightning_pipebd.runtime.row_trees import count_rows, tree_bytes
from lightning_pipebd.runtime.side_effects import untouched
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["coupled_blocks", "measure_pipeline", "name_block", "one_replica_reason", "student_modules"]

# A batch, a rank's part of it, and the smallest micro-batches that are looked at; the others lie between.
_PARTS_PER_RANK = (1, 2, 4)


def coupled_blocks(module: TeacherStudentModule) -> list[int]:
    """List the student blocks whose result depends on how a batch is cut."""
    models = student_modules(module)
    return [
        block
        for block, own in enumerate(models)
        if any(has_batch_statistics(model) or is_stochastic(model) for model in own)
    ]


def measure_pipeline(
    bench: Bench[TeacherStudentModule],
    optimizers: Sequence[Optimizer],
    machines: Sequence[Machine],
    *,
    num_ranks: int,
    looks_ahead: bool,
    cache: MeasurementCache | None = None,
) -> PipelineMeasurement | None:
    """**Collective** over all ranks: measure everything a plan is judged by, or find it in the cache.

    Args:
        bench: What to measure with.
        optimizers: The user's, over all parameters.
        machines: Of every rank.
        num_ranks: Ranks for which plans will be sought: their micro-batches are measured, too.
        looks_ahead: Whether the teacher may work on the next batch.
        cache: Where measurements are kept; `None` keeps none.

    Returns:
        The same on every rank; `None` if there is no batch to train on.

    Raises:
        ValueError: The loader can be iterated only once.
    """
    found = bring_first_batch(bench, lambda: refuse_iterator("or a loader that can be iterated again"))
    if found is None:
        return None
    first, batch = found
    key = measurement_key(
        bench.module,
        batch,
        optimizers,
        bench.plugin,
        machines=list(machines),
        num_ranks=num_ranks,
        is_synchronised=False,
    )
    number = bench.module.num_teacher_blocks + bench.module.num_student_blocks
    measurement = recall_or_measure(
        bench,
        cache,
        key,
        PipelineMeasurement,
        f"{number} blocks on a batch of {count_rows(batch[0])} rows",
        lambda: _measure(bench, optimizers, machines, batch, first, num_ranks),
    )
    # Loading is what no key can name; and what was kept may be older than what is possible now.
    return replace(
        measurement,
        loader=first.loader,
        looks_ahead=looks_ahead,
        one_replica_reason=one_replica_reason(bench.module),
    )


class _Findings(NamedTuple):
    """What one rank measured."""

    profile: PipelineProfile
    update_ms: dict[int, float]
    optimizer_bytes: dict[int, int]
    follow_ms: dict[int, float]
    step_ms: float


def _measure(
    bench: Bench[TeacherStudentModule],
    optimizers: Sequence[Optimizer],
    machines: Sequence[Machine],
    batch: tuple[Any, Any],
    first: FirstBatch,
    num_ranks: int,
) -> PipelineMeasurement:
    transport = bench.transport
    links = measure_all_links(bench, machines)
    findings = done_by_all(transport, lambda: _measure_own(bench, optimizers, batch, num_ranks))
    return done_by_rank_zero(transport, lambda: _put_together(bench, machines, batch, first, links, findings))


def _measure_own(
    bench: Bench[TeacherStudentModule], optimizers: Sequence[Optimizer], batch: tuple[Any, Any], num_ranks: int
) -> _Findings:
    module, (rank, num_peers) = bench.module, (bench.transport.rank, bench.transport.num_ranks)
    inputs, labels = batch
    num_rows = count_rows(inputs)
    own_teacher, own_student = (
        range(rank, number, num_peers) for number in (module.num_teacher_blocks, module.num_student_blocks)
    )
    parts = -(-num_rows // num_ranks)
    counts = {-(-parts // part) for part in _PARTS_PER_RANK} if num_rows > 1 else set()
    with untouched([], alone=[module]), module.not_logging():
        profile = PipelineProfiler(
            PipelineBlockJobs(module, bench.plugin),
            _parts(module),
            bench.device,
            num_rows=num_rows,
            row_counts=sorted(counts),
            is_full_batch=module.full_batch_loss,
        ).profile(
            (module.teacher_inputs(inputs), inputs, labels),
            (own_teacher, own_student),
            measures_loss=rank == 0,
            tell=TimedNews(bench.tell),
        )
    updates = measure_updates(optimizers, [module.student_parameters(block) for block in own_student], bench.device)
    return _Findings(
        profile,
        dict(zip(own_student, updates.update_ms, strict=True)),
        dict(zip(own_student, updates.optimizer_bytes, strict=True)),
        {
            block: measure_follow(module.teacher_tensors(block), bench.device)
            for block in own_teacher
            if module.momentum is not None
        },
        updates.step_ms + measure_loop(),
    )


def one_replica_reason(module: TeacherStudentModule) -> str:
    """Say why there must be one replica that has all rows of a batch; nothing if there may be more."""
    has_hook = type(module).on_teacher_update is not TeacherStudentModule.on_teacher_update
    if has_hook and not module.full_batch_loss:
        return "it overrides `on_teacher_update`, which knows of all rows with `full_batch_loss=True` only"
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse and layer.weight.requires_grad:
            return f"`{name}` has sparse gradients, which ranks cannot sum"
    return ""


def student_modules(module: TeacherStudentModule) -> list[list[nn.Module]]:
    """Give every student block's modules: the predictor belongs to the last."""
    models: list[list[nn.Module]] = [[model] for model in module.cuts.student.blocks]
    if module.predictor is not None:
        models[-1].append(module.predictor)
    return models


def _parts(module: TeacherStudentModule) -> PipelineParts:
    models = ("student", "teacher", "average", "predictor")
    return PipelineParts(
        teacher=[[model] for model in module.cuts.teacher.blocks],
        student=student_modules(module),
        loss=[child for name, child in module.named_children() if name not in models],
        owner=module,
    )


def _put_together(
    bench: Bench[TeacherStudentModule],
    machines: Sequence[Machine],
    batch: tuple[Any, Any],
    first: FirstBatch,
    links: Links,
    findings: Sequence[_Findings],
) -> PipelineMeasurement:
    module, (inputs, labels) = bench.module, batch
    num_rows = count_rows(inputs)
    loss_ms = findings[0].profile.loss_ms
    assert loss_ms is not None
    return PipelineMeasurement(
        teacher=tuple(_teacher_costs(module, block, findings) for block in range(module.num_teacher_blocks)),
        student=tuple(_student_costs(module, block, findings) for block in range(module.num_student_blocks)),
        num_rows=num_rows,
        loss_ms=loss_ms,
        teacher_input_bytes_per_row=tree_bytes(module.teacher_inputs(inputs)) // num_rows,
        student_input_bytes_per_row=tree_bytes(inputs) // num_rows,
        target_bytes_per_row=tree_bytes(labels) // num_rows,
        loader=first.loader,
        same_node=links.same_node,
        other_node=links.other_node,
        step_ms=max(found.step_ms for found in findings),
        send_ms=links.overheads.send_ms,
        recv_ms=links.overheads.recv_ms,
        noise=limited_noise(*(found.profile.noise for found in findings)),
        device_class=machines[0].device_class,
        has_momentum=module.momentum is not None,
        is_full_batch=module.full_batch_loss,
        coupled_blocks=tuple(coupled_blocks(module)),
        one_replica_reason=one_replica_reason(module),
        whole_reason=next((found.profile.whole_reason for found in findings if found.profile.whole_reason), ""),
    )


def _teacher_costs(module: TeacherStudentModule, block: int, findings: Sequence[_Findings]) -> TeacherBlockCosts:
    found = findings[block % len(findings)]
    own = found.profile.teacher[block]
    return TeacherBlockCosts(
        name=name_block(module.cuts.teacher, block),
        teach_ms=own.teach_ms,
        follow_ms=found.follow_ms.get(block, 0.0),
        parameter_bytes=sum(tensor.nbytes for tensor in module.teacher_tensors(block)),
        teach_bytes_per_row=own.work_bytes,
        output_bytes_per_row=own.output_bytes,
    )


def _student_costs(module: TeacherStudentModule, block: int, findings: Sequence[_Findings]) -> StudentBlockCosts:
    found = findings[block % len(findings)]
    own = found.profile.student[block]
    trained = [parameter for parameter in module.student_parameters(block) if parameter.requires_grad]
    return StudentBlockCosts(
        name=name_block(module.cuts.student, block),
        forward_ms=own.forward_ms,
        backward_ms=own.backward_ms,
        update_ms=found.update_ms[block],
        parameter_bytes=sum(tensor.nbytes for tensor in module.student_tensors(block)),
        gradient_bytes=sum(parameter.nbytes for parameter in trained),
        optimizer_bytes=found.optimizer_bytes[block],
        held_bytes_per_row=own.held_bytes,
        work_bytes_per_row=own.work_bytes,
        output_bytes_per_row=own.output_bytes,
    )


def name_block(partition: Partition, block: int) -> str:
    """Name a block by its first parameter's module, as far as it has one."""
    names = partition.parameter_names[block]
    return names[0].rpartition(".")[0] or names[0] if names else "no parameters"
