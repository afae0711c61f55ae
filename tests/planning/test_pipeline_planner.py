"""The planner of end-to-end training finds what trying everything finds, and says what it means."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import LinkCost, LoaderCost
from lightning_pipebd.planning.curve import CostError, Curve
from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement, StudentBlockCosts, TeacherBlockCosts
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate, PipelineJudge
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_planner import find_pipeline
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.pipeline_search import Loads, splits_by_load
from lightning_pipebd.planning.plan import PlanError


def measured(teach: list[float], forward: list[float], **changes: Any) -> PipelineMeasurement:
    """Blocks of these times for eight rows; backward takes twice the forward."""
    return PipelineMeasurement(
        **{
            "teacher": [
                TeacherBlockCosts(
                    name=f"t{index}", teach_ms=Curve([(8, ms)]), parameter_bytes=100, output_bytes_per_row=4
                )
                for index, ms in enumerate(teach)
            ],
            "student": [
                StudentBlockCosts(
                    name=f"s{index}",
                    forward_ms=Curve([(8, ms)]),
                    backward_ms=Curve([(8, 2 * ms)]),
                    update_ms=0.1,
                    parameter_bytes=100,
                    gradient_bytes=100,
                    optimizer_bytes=200,
                    held_bytes_per_row=50,
                    output_bytes_per_row=5,
                )
                for index, ms in enumerate(forward)
            ],
            "num_rows": 8,
            "loss_ms": Curve([(8, 0.2)]),
            **changes,
        }
    )


def all_sides(num_blocks: int, num_ranks: int) -> list[tuple[int, ...]]:
    return list(combinations_with_replacement(range(num_ranks), num_blocks))


TIMES = st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=1, max_size=4)


@given(TIMES, TIMES, st.integers(1, 3))
@settings(max_examples=40)
def test_cuts_come_in_the_order_of_the_heaviest_rank_and_none_is_missing(
    teacher: list[float], student: list[float], num_ranks: int
) -> None:
    found = list(splits_by_load(Loads(teacher=teacher, student=student, room=[None] * num_ranks)))

    def load(sides: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        pairs = [
            (rank, ms)
            for ranks, own in zip(sides, (teacher, student), strict=True)
            for rank, ms in zip(ranks, own, strict=True)
        ]
        return max(sum(ms for own, ms in pairs if own == rank) for rank in range(num_ranks))

    everything = list(product(all_sides(len(teacher), num_ranks), all_sides(len(student), num_ranks)))
    assert sorted((split.teacher, split.student) for split in found) == sorted(everything)
    assert [split.load for split in found] == pytest.approx(sorted(map(load, everything)))


def test_cuts_without_room_are_left_out_and_aligned_cuts_are_alike() -> None:
    loads = Loads(teacher=[1, 1], student=[1, 1], student_bytes=[6, 6], teacher_bytes=[0, 0], room=[10, None])
    assert {split.student for split in splits_by_load(loads)} == {(0, 1), (1, 1)}
    aligned = list(splits_by_load(replace(loads, student_bytes=[]), is_aligned=True))
    assert sorted(split.student for split in aligned) == [(0, 0), (0, 1), (1, 1)]
    assert all(split.student == split.teacher for split in aligned)
    few = splits_by_load(Loads(teacher=[1, 1], student=[1, 1], room=[None, None]), below=lambda: 2.5)
    assert {split.load for split in few} == {2.0}


@given(TIMES, TIMES, st.integers(1, 3), st.booleans(), st.sampled_from([0.0, 0.3]), st.sampled_from([None, 2500]))
@settings(max_examples=6, deadline=None)
def test_the_best_is_what_trying_everything_finds(
    teacher: list[float],
    student: list[float],
    num_ranks: int,
    looks_ahead: bool,
    latency_ms: float,
    limit: int | None,
) -> None:
    costs = measured(
        teacher[:3], student[:3], looks_ahead=looks_ahead, same_node=LinkCost(latency_ms=latency_ms, bytes_per_ms=100)
    )
    judge = PipelineJudge(costs, Cluster.uniform(num_ranks, memory_limit_bytes=limit))
    plans = [
        PipelinePlan(num_ranks=num_ranks, teacher=sides[0], student=sides[1])
        for sides in product(all_sides(len(costs.teacher), num_ranks), all_sides(len(costs.student), num_ranks))
    ]
    everything = [
        judge.judge(PipelineCandidate(plan, number, schedule))
        for plan in plans
        for number in (1, 3)
        for schedule in Schedule
    ]
    fitting = [own.step_time_ms for own in everything if judge.fits(own.memory)]
    if not fitting:
        with pytest.raises(PlanError, match="must fit the memory of every rank"):
            find_pipeline(judge, numbers=(1, 3), tolerance=0.0, effort=None)
        return
    found = find_pipeline(judge, numbers=(1, 3), tolerance=0.0, effort=None)
    assert found.best.step_time_ms == pytest.approx(min(fitting))
    assert found.bound_ms <= min(fitting) + 1e-9
    assert judge.fits(found.best.memory)


def test_the_usual_search_is_nearly_as_good() -> None:
    costs = measured([4, 2, 4, 4, 2, 3], [1, 4, 1, 2, 4], same_node=LinkCost(latency_ms=0.05))
    judge = PipelineJudge(costs, Cluster.uniform(3))
    exact = find_pipeline(judge, numbers=(1, 4, 8), tolerance=0.0, effort=None)
    quick = find_pipeline(judge, numbers=(1, 4, 8))
    assert quick.num_judged < exact.num_judged
    assert quick.best.step_time_ms <= 1.03 * exact.best.step_time_ms


def test_batches_stay_whole_where_cutting_gains_less_than_the_noise_or_is_not_exact() -> None:
    cluster = Cluster.uniform(2)
    costs = measured([1, 1], [1, 1])
    free = PipelineOutlook.find(costs, cluster)
    assert free.candidate.num_micro_batches > 1
    assert free.exactness is Exactness.SUMMATION
    for changed, options in (
        (replace(costs, noise=5.0), {}),
        (replace(costs, coupled_blocks=(1,)), {}),
        (replace(costs, whole_reason="rows are coupled"), {}),
        (costs, {"exactness": "bitwise"}),
    ):
        found = PipelineOutlook.find(changed, cluster, **options)
        assert (found.candidate.num_micro_batches, found.exactness) == (1, Exactness.BITWISE)
    assert "Batches are not cut: rows are coupled" in str(
        PipelineOutlook.find(replace(costs, whole_reason="rows are coupled"), cluster)
    )


def test_what_is_said_is_kept() -> None:
    found = PipelineOutlook.find(measured([1, 1], [1, 1]), Cluster.uniform(2), num_micro_batches=4, schedule="gpipe")
    assert found.candidate[1:] == (4, Schedule.GPIPE)


def test_a_momentum_teacher_stays_with_its_student() -> None:
    costs = measured([1, 3, 1], [3, 1, 1], has_momentum=True)
    assert (
        PipelineOutlook.find(costs, Cluster.uniform(2)).plan.teacher
        == PipelineOutlook.find(costs, Cluster.uniform(2)).plan.student
    )
    frozen = PipelineOutlook.find(measured([1, 3, 1, 1], [6, 1, 1]), Cluster.uniform(2)).plan
    assert frozen.teacher != (0, 0, 1, 1)


def test_less_memory_chooses_what_holds_fewer_micro_batches() -> None:
    costs = measured([1, 1], [1, 1])
    peaks = {}
    for schedule in (Schedule.GPIPE, Schedule.ONE_FORWARD_ONE_BACKWARD):
        judge = PipelineJudge(costs, Cluster.uniform(2))
        memory = judge.memory(PipelineCandidate(PipelinePlan.parse("0|1"), 8, schedule))
        peaks[schedule] = memory[0].working_bytes
    assert peaks[Schedule.GPIPE] > peaks[Schedule.ONE_FORWARD_ONE_BACKWARD]


def test_what_one_rank_holds_is_counted() -> None:
    judge = PipelineJudge(measured([1], [1]), Cluster.uniform(1))
    (use,) = judge.memory(PipelineCandidate(PipelinePlan.parse("0"), 1, Schedule.TEACHER_FIRST))
    # Both blocks' weights; at the loss 8 rows of held activations, teacher's output and gradient; no queue.
    assert use == (500, 8 * (50 + 4 + 5), 0)


def test_a_plan_that_does_not_fit_is_refused_with_numbers() -> None:
    costs = measured([1, 1], [1, 1])
    small = Cluster.uniform(2, memory_limit_bytes=300)
    with pytest.raises(PlanError, match=r"which need least of what was tried, rank 0 needs .* of 300 B"):
        PipelineOutlook.find(costs, small)
    given = PipelineOutlook(
        candidate=PipelineCandidate(PipelinePlan.parse("0|1"), 2, Schedule.GPIPE), measurement=costs, cluster=small
    )
    with pytest.raises(PlanError, match=r"`plan` must fit the memory of every rank, but rank 0 needs .* of 300 B"):
        given.check_memory()


def test_memory_that_is_short_for_the_fastest_still_has_a_plan() -> None:
    costs = measured([1, 1, 1], [1, 1, 1])
    roomy = PipelineOutlook.find(costs, Cluster.uniform(2))
    most = max(use.total_bytes for use in roomy.judgement.memory)
    tight = PipelineOutlook.find(costs, Cluster.uniform(2, memory_limit_bytes=most - 1))
    assert max(use.total_bytes for use in tight.judgement.memory) < most
    assert tight.step_time_ms >= roomy.step_time_ms


def test_the_outlook_tells_times_alternatives_and_memory() -> None:
    found = PipelineOutlook.find(measured([1, 1], [1, 1], loader=LoaderCost(fixed_ms=0.1)), Cluster.uniform(2))
    text = str(found)
    for words in ("predicted: ", "ranks busy ", 'strategy="ddp"', "memory: rank 0 ", "exactness: ", "teacher 0 (t0)"):
        assert words in text
    assert found.to_dict()["ddp_ms"] == found.replicas_ms == pytest.approx(1 + 3 + 0.2 + 0.1)


def test_costs_that_cannot_be_are_refused() -> None:
    with pytest.raises(CostError, match="`update_ms` of student block 'a' must be finite"):
        StudentBlockCosts(name="a", forward_ms=Curve([(1, 1)]), backward_ms=Curve([(1, 1)]), update_ms=-1)
    with pytest.raises(CostError, match="`student` must have at least one block"):
        measured([1], [])
    with pytest.raises(CostError, match="`num_rows` must be at least 1"):
        measured([1], [1], num_rows=0)
    with pytest.raises(CostError, match="must have the student's 2 blocks, because it follows them"):
        measured([1], [1, 1], has_momentum=True)
    with pytest.raises(CostError, match="`coupled_blocks` must be below 1"):
        measured([1], [1], coupled_blocks=(1,))


@given(TIMES, TIMES, st.sampled_from([0.0, 0.5]), st.sampled_from([None, 2500]), st.booleans())
@settings(max_examples=3, deadline=None)
def test_with_replicas_the_best_is_what_trying_everything_finds(
    teacher: list[float], student: list[float], latency_ms: float, limit: int | None, is_full_batch: bool
) -> None:
    link = LinkCost(latency_ms=latency_ms, bytes_per_ms=100)
    costs = measured(teacher[:2], student[:2], same_node=link, is_full_batch=is_full_batch)
    judge = PipelineJudge(costs, Cluster.uniform(4, memory_limit_bytes=limit))
    numbers = {1: (1, 3), 2: (1, 2), 4: (1,)}
    everything = [
        judge.judge(PipelineCandidate(PipelinePlan(num_ranks=4, teacher=sides[0], student=sides[1], replicas=r), *rest))
        for r, own in numbers.items()
        for sides in product(all_sides(len(costs.teacher), 4 // r), all_sides(len(costs.student), 4 // r))
        for rest in product(own, Schedule)
    ]
    fitting = [own.step_time_ms for own in everything if judge.fits(own.memory)]
    found = find_pipeline(judge, numbers=(1, 3), replica_numbers=numbers, tolerance=0.0, effort=None)
    assert found.best.step_time_ms == pytest.approx(min(fitting))
    assert found.bound_ms <= min(fitting) + 1e-9


def test_replicas_are_chosen_where_sums_are_cheap_and_pipelines_where_they_are_not() -> None:
    costs = measured([1, 1], [3, 3])
    cheap = PipelineOutlook.find(costs, Cluster.uniform(4))
    # One batch on four ranks: a quarter of the work, and the updates.
    assert str(cheap.plan) == "4 x 0-1"
    assert cheap.step_time_ms == pytest.approx((2 + 18 + 0.2) / 4 + 0.2)
    assert cheap.exactness is Exactness.SUMMATION
    assert "replicas: rank 0 loads for all, gradients are summed before updates" in str(cheap)
    slow = PipelineOutlook.find(
        replace(costs, same_node=LinkCost(latency_ms=5.0, bytes_per_ms=1e9)), Cluster.uniform(2)
    )
    assert slow.plan.replicas == 1
    assert "times): 2 replicas, 2 x 0-1 with one micro-batch" in str(slow)


def test_within_nodes_are_pipelines_and_between_them_sums() -> None:
    # What passes between blocks is much, gradients are little, and the link between nodes is slow.
    costs = measured(
        [1, 1], [3, 3], student_input_bytes_per_row=0, other_node=LinkCost(latency_ms=0.1, bytes_per_ms=200)
    )
    blocks = [replace(block, output_bytes_per_row=400, parameter_bytes=100_000) for block in costs.student]
    cluster = Cluster.uniform(4, memory_limit_bytes=150_000, ranks_per_node=2)
    found = PipelineOutlook.find(replace(costs, student=blocks), cluster)
    assert (found.plan.replicas, found.plan.ranks_per_replica) == (2, 2)


def test_where_all_rows_must_be_on_one_rank_there_is_one_replica() -> None:
    costs, cluster = measured([1, 1], [3, 3]), Cluster.uniform(2)
    assert PipelineOutlook.find(costs, cluster).plan.replicas == 2
    for changed, options in (
        (replace(costs, one_replica_reason="the loss wants it so"), {}),
        (replace(costs, coupled_blocks=(0,)), {}),
        (costs, {"exactness": "bitwise"}),
    ):
        assert PipelineOutlook.find(changed, cluster, **options).plan.replicas == 1
    text = str(PipelineOutlook.find(replace(costs, one_replica_reason="the loss wants it so"), cluster))
    assert "There is one replica, because the loss wants it so." in text


def test_a_step_of_replicas_takes_their_sums_and_waits_for_inputs_unless_they_come_ahead() -> None:
    plan = PipelinePlan.parse("2 x 0")
    link = LinkCost(latency_ms=0.5, bytes_per_ms=100)
    costs = measured([2], [4], same_node=link, student_input_bytes_per_row=25)

    def step_ms(costs: PipelineMeasurement, schedule: Schedule, ranks_per_node: int = 2) -> float:
        judge = PipelineJudge(costs, Cluster.uniform(2, ranks_per_node=ranks_per_node))
        return judge.judge(PipelineCandidate(plan, 1, schedule)).step_time_ms

    # Half a batch's work, and the sum of 100 bytes by a ring; then four rows of 25 bytes arrive.
    alone = (2 + 12 + 0.2) / 2 + 0.1
    assert step_ms(costs, Schedule.TEACHER_FIRST) == pytest.approx(alone + link.reduce_ms(100, 2) + 0.5 + 1)
    # While the teacher works on the next batch, the sum is under way.
    ahead = step_ms(costs, Schedule.ONE_FORWARD_ONE_BACKWARD)
    assert ahead == pytest.approx(alone - 1 + link.reduce_ms(100, 2))
    far = replace(costs, same_node=LinkCost(), other_node=link)
    assert step_ms(far, Schedule.ONE_FORWARD_ONE_BACKWARD) == pytest.approx(alone)
    assert step_ms(far, Schedule.ONE_FORWARD_ONE_BACKWARD, 1) == pytest.approx(ahead)


def test_a_loss_of_all_rows_waits_for_the_outputs_and_its_gradients_come_back() -> None:
    link = LinkCost(latency_ms=0.5, bytes_per_ms=100)
    costs = measured([2], [4], same_node=link, is_full_batch=True, loss_ms=Curve([(8, 0.6)]))
    judge = PipelineJudge(costs, Cluster.uniform(2))
    found = judge.judge(PipelineCandidate(PipelinePlan.parse("2 x 0"), 1, Schedule.TEACHER_FIRST))
    # Rank 1 gets its inputs, teaches, and goes forward; 20 bytes of outputs travel, then as many of gradients.
    there_and_back = (0.5 + 0.2) + 0.6 + (0.5 + 0.2)
    assert found.step_time_ms == pytest.approx(0.5 + 1 + 2 + there_and_back + 4 + link.reduce_ms(100, 2) + 0.1)
    # The whole loss on one rank, which is no part of what the other has to do.
    assert found.busy_ms == pytest.approx((1 + 2 + 0.6 + 4 + 0.1, 1 + 2 + 4 + 0.1))


def test_a_loss_of_the_full_batch_finds_replicas_unless_the_outputs_are_large() -> None:
    costs, cluster = measured([1, 1], [3, 3], is_full_batch=True), Cluster.uniform(4)
    found = PipelineOutlook.find(costs, cluster)
    assert str(found.plan) == "4 x 0-1"
    assert found.step_time_ms == pytest.approx((2 + 18) / 4 + 0.2 + 0.2)
    assert "replicas: rank 0 loads for all, rank 0 has the loss of all rows, gradients are summed" in str(found)
    assert 'strategy="ddp", all blocks on every rank, which has a loss of its own rows' in str(found)
    blocks = [costs.student[0], replace(costs.student[1], output_bytes_per_row=10_000)]
    slow = replace(costs, student=blocks, same_node=LinkCost(bytes_per_ms=1000))
    assert PipelineOutlook.find(slow, cluster).plan.replicas == 1


def test_the_rank_of_a_loss_of_all_rows_holds_their_outputs() -> None:
    judge = PipelineJudge(measured([1], [1], is_full_batch=True), Cluster.uniform(2))
    first, second = judge.memory(PipelineCandidate(PipelinePlan.parse("2 x 0"), 1, Schedule.TEACHER_FIRST))
    # Four rows held, both outputs of the other four; at the loss eight gradients, and the outputs joined.
    assert first.working_bytes == 4 * (4 + 50) + 4 * (4 + 5) + 8 * 5 + 8 * (4 + 5)
    # Four rows held, and their gradients.
    assert second.working_bytes == 4 * 50 + 4 * 5
    (ahead, _) = judge.memory(PipelineCandidate(PipelinePlan.parse("2 x 0"), 1, Schedule.ONE_FORWARD_ONE_BACKWARD))
    assert ahead.working_bytes == 8 * 4 + 4 * 50 + 4 * 5 + 8 * 5 + 8 * (4 + 5)


def test_what_every_rank_of_a_replica_holds_is_counted() -> None:
    judge = PipelineJudge(measured([1], [1], student_input_bytes_per_row=10), Cluster.uniform(2))
    first, second = judge.memory(PipelineCandidate(PipelinePlan.parse("2 x 0"), 1, Schedule.TEACHER_FIRST))
    # Weights as on one rank, and a copy of the gradients; half the activations; the inputs of all rows where they load.
    assert first.weight_bytes == second.weight_bytes == 500 + 100
    assert first.working_bytes - second.working_bytes == 4 * 10
