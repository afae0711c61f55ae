"""Programs of pipelines side by side: their laws, their rows, their sums, and what these take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.laws import LawError
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline
from lightning_pipebd.planning.pipeline_laws import check_pipeline_laws
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.plan import PlanError

PLANS = ["2 x 0|1", "3 x 0-1", "2 x 0-1|2 / 0,2|1", "2 x 1|0 / 0|1", "4 x 0", "2 x 0-2|- / -|0-1"]


@st.composite
def steps(draw: st.DrawFn) -> PipelineStep:
    return PipelineStep(
        num_rows=draw(st.integers(1, 9)),
        num_micro_batches=draw(st.integers(1, 4)),
        teaches_own=draw(st.booleans()),
        num_next_rows=draw(st.integers(0, 9)),
        is_full_batch=draw(st.booleans()),
        has_targets=draw(st.booleans()),
        schedule=draw(st.sampled_from(Schedule)),
        splits_backward=draw(st.booleans()),
        update=draw(st.booleans()),
        has_momentum=False,
    )


@settings(max_examples=150)
@given(st.sampled_from(PLANS), steps(), st.booleans())
def test_programs_of_replicas_obey_the_laws_and_read_back(text: str, step: PipelineStep, has_momentum: bool) -> None:
    plan = PipelinePlan.parse(text)
    step = replace(step, has_momentum=has_momentum and len(plan.teacher) == len(plan.student))
    programs = compile_pipeline(plan, step)
    check_pipeline_laws(plan, programs, step)
    assert [PipelineProgram.parse(str(program)) for program in programs] == list(programs)


STEP = PipelineStep(num_rows=4, num_micro_batches=2, teaches_own=False, num_next_rows=4)


def check_that_a_change_breaks(plan: PipelinePlan, step: PipelineStep, rank: int, old: str, new: str, law: str) -> None:
    programs = list(compile_pipeline(plan, step))
    text = str(programs[rank])
    assert old in text
    programs[rank] = PipelineProgram.parse(text.replace(old, new, 1))
    with pytest.raises(LawError, match=f"'{law}'"):
        check_pipeline_laws(plan, programs, step)


@pytest.mark.parametrize(
    ("old", "new", "law"),
    [
        ("REDUCE block=1 ranks=1,3", "REDUCE block=1 ranks=0,1", "summed once, after backward"),
        ("REDUCE block=1 ranks=1,3", "REDUCE block=0 ranks=1,3", "summed once, after backward"),
        ("UPDATE block=1", "REDUCE block=1 ranks=1,3", "summed once, after backward"),
        ("FORWARD block=1 rows=2:3", "FORWARD block=1 rows=0:1", "each micro-batch once"),
    ],
)
def test_a_changed_program_of_a_replica_breaks_the_law(old: str, new: str, law: str) -> None:
    plan = PipelinePlan.parse("2 x 0|1")
    check_that_a_change_breaks(plan, STEP, 3, old, new, law)


def test_a_sum_before_the_last_backward_is_refused() -> None:
    plan = PipelinePlan.parse("2 x 0")
    programs = list(compile_pipeline(plan, STEP))
    lines = str(programs[1]).splitlines()
    lines.remove("REDUCE block=0 ranks=0,1")
    lines.insert(lines.index("BACKWARD block=0 rows=3:4"), "REDUCE block=0 ranks=0,1")
    programs[1] = PipelineProgram.parse("\n".join(lines))
    with pytest.raises(LawError, match="the block was summed before"):
        check_pipeline_laws(plan, programs, STEP)


def test_one_rank_loads_and_sends_each_replica_its_rows() -> None:
    step = replace(STEP, num_rows=5, num_next_rows=2, teaches_own=True)
    programs = compile_pipeline(PipelinePlan.parse("3 x 0"), step)
    sent = [str(action) for action in programs[0].actions if action.stream is Stream.INPUTS]
    assert sent == [
        "SEND inputs=0 rows=2:4 to=1",
        "SEND inputs=0 rows=4:5 to=2",
        "SEND inputs=0 rows=1:2 to=1 batch=next",
    ]
    loads = [str(action) for program in programs for action in program.actions if action.kind is PipelineKind.LOAD]
    assert loads == ["LOAD rows=0:5", "LOAD rows=0:2 batch=next"]


def test_where_the_teacher_works_ahead_rows_are_sent_a_step_ahead_and_arrive_beside_the_work() -> None:
    programs = compile_pipeline(PipelinePlan.parse("2 x 0"), replace(STEP, num_micro_batches=1))
    assert list(map(str, programs[1].actions)) == [
        "FORWARD block=0 rows=2:4",
        "LOSS rows=2:4",
        "BACKWARD block=0 rows=2:4",
        "REDUCE block=0 ranks=0,1",
        "RECV inputs=0 rows=2:4 from=0 batch=next",
        "TEACH block=0 rows=2:4 batch=next",
        "UPDATE block=0",
    ]


def test_a_replica_without_a_row_takes_part_in_the_sums_alone() -> None:
    last = compile_pipeline(PipelinePlan.parse("3 x 0-1"), replace(STEP, num_rows=2, num_next_rows=0))[2]
    assert list(map(str, last.actions)) == [
        "REDUCE block=1 ranks=0,1,2",
        "REDUCE block=0 ranks=0,1,2",
        "UPDATE block=0",
        "UPDATE block=1",
    ]


def test_sums_begin_as_soon_as_the_gradients_are_there_once_per_optimizer_step() -> None:
    plan = PipelinePlan.parse("2 x 0-1")
    actions = list(map(str, compile_pipeline(plan, replace(STEP, num_micro_batches=1, num_next_rows=0))[0].actions))
    start = actions.index("BACKWARD block=1 rows=0:2")
    assert actions[start : start + 4] == [
        "BACKWARD block=1 rows=0:2",
        "REDUCE block=1 ranks=0,1",
        "BACKWARD block=0 rows=0:2",
        "REDUCE block=0 ranks=0,1",
    ]
    waiting = compile_pipeline(plan, replace(STEP, update=False))
    assert not any(action.kind is PipelineKind.REDUCE for program in waiting for action in program.actions)


FULL = replace(STEP, is_full_batch=True, has_targets=True)


def test_a_loss_of_the_full_batch_is_computed_once_where_all_outputs_come_together() -> None:
    programs = compile_pipeline(PipelinePlan.parse("2 x 0|1"), FULL)
    assert list(map(str, programs[1].actions)) == [
        *("RECV hidden=1 rows=0:1 from=0", "FORWARD block=1 rows=0:1"),
        *("RECV hidden=1 rows=1:2 from=0", "FORWARD block=1 rows=1:2"),
        "RECV targets=0 rows=0:4 from=0",
        *("RECV hidden=2 rows=2:3 from=3", "RECV hidden=2 rows=3:4 from=3"),
        "LOSS rows=0:4",
        *("SEND gradient=2 rows=2:3 to=3", "SEND gradient=2 rows=3:4 to=3"),
        *("BACKWARD block=1 rows=0:1", "SEND gradient=1 rows=0:1 to=0"),
        *("BACKWARD block=1 rows=1:2", "SEND gradient=1 rows=1:2 to=0"),
        "REDUCE block=1 ranks=1,3",
        *("RECV boundary=1 rows=0:1 from=0 batch=next", "TEACH block=1 rows=0:1 batch=next"),
        *("RECV boundary=1 rows=1:2 from=0 batch=next", "TEACH block=1 rows=1:2 batch=next"),
        *("RECV boundary=2 rows=2:3 from=3 batch=next", "RECV boundary=2 rows=3:4 from=3 batch=next"),
        "UPDATE block=1",
    ]
    others = [str(action) for program in programs[2:] for action in program.actions]
    assert not [text for text in others if text.startswith("LOSS") or "targets" in text]


def test_where_the_teacher_ends_elsewhere_its_outputs_of_all_replicas_go_to_the_loss() -> None:
    step = replace(FULL, num_micro_batches=1, teaches_own=True, num_next_rows=0)
    programs = compile_pipeline(PipelinePlan.parse("2 x 1|0 / 0|1"), step)
    taught = [
        str(action) for program in programs for action in program.actions if str(action).startswith("SEND boundary=2")
    ]
    assert taught == ["SEND boundary=2 rows=0:2 to=1", "SEND boundary=2 rows=2:4 to=1"]


def test_a_replica_without_a_row_sends_no_output() -> None:
    programs = compile_pipeline(PipelinePlan.parse("3 x 0-1"), replace(FULL, num_rows=2, num_next_rows=0))
    received = [str(action) for action in programs[0].actions if action.kind is PipelineKind.RECV]
    assert received == ["RECV hidden=2 rows=1:2 from=1"]
    assert {action.kind for action in programs[2].actions} == {PipelineKind.REDUCE, PipelineKind.UPDATE}


@pytest.mark.parametrize(
    ("rank", "old", "new", "law"),
    [
        (1, "LOSS rows=0:4", "LOSS rows=0:2", "each micro-batch once"),
        (1, "LOSS rows=0:4", "LOSS rows=0:2\nLOSS rows=2:4", "each micro-batch once"),
        (3, "RECV gradient=2 rows=2:3 from=1", "LOSS rows=2:4", "work where the plan says"),
        (1, "SEND gradient=2 rows=2:3 to=3\n", "", "a send for each receive"),
    ],
)
def test_a_second_loss_and_a_missing_gradient_break_the_law(rank: int, old: str, new: str, law: str) -> None:
    plan = PipelinePlan.parse("2 x 0|1")
    check_that_a_change_breaks(plan, FULL, rank, old, new, law)


def test_outputs_that_come_after_the_loss_are_refused() -> None:
    plan = PipelinePlan.parse("2 x 0|1")
    programs = list(compile_pipeline(plan, FULL))
    lines = str(programs[1]).splitlines()
    lines.remove("RECV hidden=2 rows=3:4 from=3")
    lines.insert(lines.index("LOSS rows=0:4") + 1, "RECV hidden=2 rows=3:4 from=3")
    programs[1] = PipelineProgram.parse("\n".join(lines))
    with pytest.raises(LawError, match="'nothing before its input'"):
        check_pipeline_laws(plan, programs, FULL)


@pytest.mark.parametrize("text", PLANS)
def test_a_plan_with_replicas_is_read_back_from_its_text_and_its_dictionary(text: str) -> None:
    plan = PipelinePlan.parse(text)
    assert str(plan) == text
    assert PipelinePlan.from_dict(plan.to_dict()) == plan
    assert PipelinePlan.parse(text.replace(" ", "")) == plan


@pytest.mark.parametrize(
    ("text", "message"), [("0 x 0|1", "`replicas` must divide the 2 ranks, but is 0"), ("x 0|1", "has the token 'x0'")]
)
def test_replicas_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PipelinePlan.parse(text)


def test_replicas_divide_the_ranks_and_name_their_own() -> None:
    with pytest.raises(PlanError, match="`replicas` must divide the 4 ranks, but is 3"):
        PipelinePlan(num_ranks=4, teacher=(0,), student=(0,), replicas=3)
    with pytest.raises(PlanError, match=r"`student\[0\]` must be a rank from 0 to 1, but is 2"):
        PipelinePlan(num_ranks=4, teacher=(0,), student=(2,), replicas=2)
