"""Programs of end-to-end training: their form, their laws, and how well they fill the ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.costs import LinkCost
from lightning_pipebd.planning.laws import LawError
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline, micro_batches
from lightning_pipebd.planning.pipeline_laws import check_pipeline_laws
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.pipeline_schedule import Durations, Schedule
from lightning_pipebd.planning.pipeline_simulate import PipelineCosts, half_batch_programs, simulate_pipeline
from lightning_pipebd.planning.plan import PlanError, Rows


def straight(num_ranks: int) -> PipelinePlan:
    return PipelinePlan(num_ranks=num_ranks, teacher=range(num_ranks), student=range(num_ranks))


@st.composite
def plans(draw: st.DrawFn) -> PipelinePlan:
    num_ranks = draw(st.integers(1, 4))
    rank = st.integers(0, num_ranks - 1)
    sides = [tuple(draw(st.lists(rank, min_size=1, max_size=5))) for _ in range(2)]
    return PipelinePlan(num_ranks=num_ranks, teacher=sides[0], student=sides[1])


@st.composite
def steps(draw: st.DrawFn) -> PipelineStep:
    return PipelineStep(
        num_rows=draw(st.integers(1, 9)),
        num_micro_batches=draw(st.integers(1, 6)),
        teaches_own=draw(st.booleans()),
        num_next_rows=draw(st.integers(0, 9)),
        is_full_batch=draw(st.booleans()),
        has_targets=draw(st.booleans()),
        schedule=draw(st.sampled_from(Schedule)),
        splits_backward=draw(st.booleans()),
        update=draw(st.booleans()),
    )


@settings(max_examples=150)
@given(plans(), steps(), st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=10, max_size=10))
def test_programs_of_any_plan_obey_the_laws_and_read_back(
    plan: PipelinePlan, step: PipelineStep, times: list[float]
) -> None:
    durations = Durations(teacher=tuple(times[: len(plan.teacher)]), student=tuple(times[5 : 5 + len(plan.student)]))
    programs = compile_pipeline(plan, step, durations)
    check_pipeline_laws(plan, programs, step)
    assert [PipelineProgram.parse(str(program)) for program in programs] == list(programs)


@settings(max_examples=60)
@given(plans(), steps(), st.data())
def test_a_momentum_teacher_follows_every_block_wherever_it_is(
    plan: PipelinePlan, step: PipelineStep, data: st.DataObject
) -> None:
    ranks = st.integers(0, plan.num_ranks - 1)
    teacher = data.draw(st.lists(ranks, min_size=len(plan.student), max_size=len(plan.student)))
    plan, step = replace(plan, teacher=tuple(teacher)), replace(step, has_momentum=True)
    check_pipeline_laws(plan, compile_pipeline(plan, step), step)


@settings(max_examples=100)
@given(plans(), steps(), st.integers(1, 3), st.data())
def test_programs_without_one_of_their_actions_are_refused(
    plan: PipelinePlan, step: PipelineStep, replicas: int, data: st.DataObject
) -> None:
    plan = replace(plan, num_ranks=replicas * plan.num_ranks, replicas=replicas)
    programs = list(compile_pipeline(plan, step))
    places = [
        (program.rank, index)
        for program in programs
        for index, action in enumerate(program.actions)
        if action.kind is not PipelineKind.LOAD
    ]
    rank, index = data.draw(st.sampled_from(places))
    actions = programs[rank].actions
    programs[rank] = programs[rank]._replace(actions=actions[:index] + actions[index + 1 :])
    with pytest.raises(LawError):
        check_pipeline_laws(plan, programs, step)


STEP = PipelineStep(num_rows=4, num_micro_batches=2, teaches_own=False, num_next_rows=4, has_momentum=True)


@pytest.mark.parametrize(
    ("rank", "old", "new", "law"),
    [
        (0, "FORWARD block=0 rows=0:2", "FORWARD block=0 rows=2:4", "each micro-batch once"),
        (0, "FORWARD block=0 rows=0:2", "FORWARD block=1 rows=0:2", "work where the plan says"),
        (0, "SEND hidden=1 rows=0:2 to=1", "SEND hidden=1 rows=2:4 to=1", "a receive for each send"),
        (1, "SEND gradient=1 rows=0:2 to=0", "UPDATE block=1", "a send for each receive"),
        (1, "BACKWARD block=1 rows=0:2", "EMA block=1", "each micro-batch once"),
        (1, "UPDATE block=1", "EMA block=1", "the teacher follows after the update"),
        (1, "EMA block=1", "UPDATE block=1", "updated once, after backward"),
    ],
)
def test_a_changed_program_breaks_the_law(rank: int, old: str, new: str, law: str) -> None:
    plan = straight(2)
    programs = list(compile_pipeline(plan, STEP))
    text = str(programs[rank])
    assert old in text
    programs[rank] = PipelineProgram.parse(text.replace(old, new, 1))
    with pytest.raises(LawError, match=f"'{law}'"):
        check_pipeline_laws(plan, programs, STEP)


def test_ranks_that_receive_before_they_send_wait_for_ever() -> None:
    plan = straight(2)
    programs = list(compile_pipeline(plan, STEP))
    lines = str(programs[0]).splitlines()
    received = next(line for line in lines if line.startswith("RECV gradient=1 rows=0:2"))
    lines.remove(received)
    lines.insert(2, received)
    programs[0] = PipelineProgram.parse("\n".join(lines))
    with pytest.raises(LawError, match="'no cycle of waits'"):
        check_pipeline_laws(plan, programs, STEP)


def test_an_update_before_a_backward_is_refused() -> None:
    plan = straight(2)
    programs = list(compile_pipeline(plan, STEP))
    actions = list(programs[1].actions)
    update = next(action for action in actions if action.kind is PipelineKind.UPDATE)
    actions.remove(update)
    programs[1] = programs[1]._replace(actions=(*actions[:3], update, *actions[3:]))
    with pytest.raises(LawError, match="updated once, after backward"):
        check_pipeline_laws(plan, programs, STEP)


def test_a_loss_of_the_full_batch_waits_for_every_forward() -> None:
    step = PipelineStep(num_rows=6, num_micro_batches=3, is_full_batch=True)
    last = compile_pipeline(straight(2), step)[1]
    kinds = [action.kind for action in last.actions]
    losses = [action for action in last.actions if action.kind is PipelineKind.LOSS]
    assert [loss.rows for loss in losses] == [Rows(0, 6)]
    assert max(i for i, kind in enumerate(kinds) if kind is PipelineKind.FORWARD) < kinds.index(PipelineKind.LOSS)


def test_1f1b_holds_few_micro_batches_and_gpipe_all() -> None:
    plan = straight(4)
    held = {}
    for schedule in (Schedule.ONE_FORWARD_ONE_BACKWARD, Schedule.GPIPE):
        step = PipelineStep(num_rows=16, num_micro_batches=16, teaches_own=False, num_next_rows=16, schedule=schedule)
        held[schedule] = simulate_pipeline(compile_pipeline(plan, step), PipelineCosts.equal(4, 1.0)).max_micro_batches
    assert held == {
        Schedule.ONE_FORWARD_ONE_BACKWARD: (6, 5, 4, 1),
        Schedule.GPIPE: (16, 16, 16, 16),
    }


@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 4.0])
def test_the_teacher_in_the_gaps_keeps_equal_stages_busy(num_ranks: int, ratio: float) -> None:
    num_rows = 4 * num_ranks
    step = PipelineStep(num_rows=num_rows, num_micro_batches=num_rows, teaches_own=False, num_next_rows=num_rows)
    durations = Durations(teacher=(ratio,) * num_ranks, student=(1.0,) * num_ranks)
    programs = compile_pipeline(straight(num_ranks), step, durations)
    assert simulate_pipeline(programs, PipelineCosts.equal(num_ranks, ratio)).utilisation >= 0.94


# Utilisation (3 + ratio) / period; the periods are those that the released order was found to have: 5 where the teacher
# is no slower than the student's forward, and from there on growing with the ratio.
@pytest.mark.parametrize(
    ("num_ranks", "ratio", "period"),
    [
        *((4, 0.25, 5.0), (4, 0.5, 5.0), (4, 1.0, 5.0), (4, 2.0, 6.33), (4, 4.0, 9.0)),
        *((8, 0.5, 5.0), (8, 1.0, 5.0), (8, 2.0, 6.43), (8, 4.0, 9.29)),
    ],
)
def test_the_order_that_tspipe_released_has_its_known_bubbles(num_ranks: int, ratio: float, period: float) -> None:
    found = simulate_pipeline(half_batch_programs(num_ranks), PipelineCosts.equal(num_ranks, ratio))
    assert found.step_time_ms == pytest.approx(period, abs=0.01)


def test_the_released_order_obeys_the_laws() -> None:
    step = PipelineStep(num_rows=6, num_micro_batches=6, teaches_own=False, num_next_rows=6, is_full_batch=True)
    check_pipeline_laws(straight(4), half_batch_programs(4), step)


def test_splitting_the_backward_fills_the_gaps_of_few_micro_batches() -> None:
    durations = Durations(teacher=(0.5,) * 4, student=(1.0,) * 4)
    whole = PipelineStep(num_rows=8, num_micro_batches=8, teaches_own=False, num_next_rows=8)
    found = [
        simulate_pipeline(compile_pipeline(straight(4), step, durations), PipelineCosts.equal(4, 0.5)).utilisation
        for step in (whole, replace(whole, splits_backward=True))
    ]
    assert found[1] > found[0] + 0.1


def test_messages_that_take_time_only_lengthen_a_step() -> None:
    step = PipelineStep(num_rows=8, num_micro_batches=8, teaches_own=False, num_next_rows=8)
    programs = compile_pipeline(straight(4), step)
    costs = PipelineCosts.equal(4, 1.0)
    free = simulate_pipeline(programs, costs).step_time_ms
    late = LinkCost(latency_ms=0.5)
    assert simulate_pipeline(programs, replace(costs, links=(late, late))).step_time_ms > free
    narrow = replace(costs, stream_bytes={Stream.HIDDEN: [80.0] * 5}, links=(LinkCost(bytes_per_ms=20),) * 2)
    assert simulate_pipeline(programs, narrow).step_time_ms > free
    # Ranks on one node do not see what messages between nodes cost.
    assert simulate_pipeline(programs, replace(costs, links=(LinkCost(), late))).step_time_ms == free
    assert simulate_pipeline(programs, replace(costs, links=(LinkCost(), late), node=(0, 0, 1, 1))).step_time_ms > free


def test_micro_batches_are_uneven_where_rows_do_not_divide_and_never_empty() -> None:
    assert [str(rows) for rows in micro_batches(7, 3)] == ["0:3", "3:5", "5:7"]
    assert len(micro_batches(2, 8)) == 2


@pytest.mark.parametrize("text", ["0-1|2-3", "0-3|4-7 / 0-1|2-3", "0,3|1-2", "-|0-1", "0-1|- / -|0-1"])
def test_a_plan_is_read_back_from_its_text_and_its_dictionary(text: str) -> None:
    plan = PipelinePlan.parse(text)
    assert str(plan) == text
    assert PipelinePlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-1|x", "has the token 'x'"),
        ("0|0", "names block 0 twice"),
        ("0|2", r"leaves out \[1\]"),
        ("-|-", "must have at least one block"),
    ],
)
def test_a_plan_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PipelinePlan.parse(text)


def test_plans_name_existing_ranks_and_known_keys() -> None:
    with pytest.raises(PlanError, match=r"`student\[0\]` must be a rank from 0 to 0, but is 3"):
        PipelinePlan(num_ranks=1, teacher=(0,), student=(3,))
    with pytest.raises(PlanError, match="must have the keys num_ranks, teacher and student, but has ranks"):
        PipelinePlan.from_dict({"ranks": 2})


def test_a_momentum_teacher_has_the_students_blocks() -> None:
    with pytest.raises(PlanError, match="must have the same blocks, but have 4 and 2"):
        compile_pipeline(PipelinePlan.parse("0-1|2-3 / 0|1"), PipelineStep(num_rows=2, has_momentum=True))


@pytest.mark.parametrize("text", ["FORWARD rows=0:2", "SEND hidden=1 rows=0:2", "JUMP", "LOSS rows=a:b", "UPDATE x"])
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must have a form like"):
        PipelineAction.parse(text)


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="must start with 'PIPELINE"):
        PipelineProgram.parse("PROGRAM rank=0 rows=2")


def test_a_step_has_rows() -> None:
    with pytest.raises(ValueError, match="`num_rows` must be at least 1"):
        PipelineStep(num_rows=0)


def test_streams_are_spelled_in_small_letters() -> None:
    assert [stream.word for stream in Stream] == ["boundary", "hidden", "gradient", "targets", "weights", "inputs"]
