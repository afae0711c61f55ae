from __future__ import annotations

import pytest

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.laws import LawError, check_laws
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import Action, Program

# Rank 0: LOAD 0:8, SEND targets, TEACH 0, SEND 1, TEACH 1 0:2, SEND 2, LEARN 0, LEARN 1 0:2, REDUCE 1, UPDATE 0, 1.
# Rank 1: RECV 1 2:8, TEACH 1 2:8, RECV 2 0:2, TEACH 2, LEARN 1 2:8, REDUCE 1, RECV targets, LEARN 2, UPDATE 1, 2.
FRACTIONAL = "0,1:1/4|1:3/4,2"

Programs = tuple[Program, ...]


def last_block(text: str) -> tuple[int]:
    """Name the one block that reads labels in these tests."""
    return (parse_plan(text).num_blocks - 1,)


def programs_of(text: str, *, update: bool = True) -> Programs:
    return compile_programs(parse_plan(text), 8, target_blocks=last_block(text), update=update)


def edited(programs: Programs, rank: int, old: str, *new: str) -> Programs:
    """Put other actions in the place of one action of one rank."""
    actions = list(programs[rank].actions)
    place = actions.index(Action.parse(old))
    actions[place : place + 1] = [Action.parse(text) for text in new]
    return (*programs[:rank], programs[rank]._replace(actions=tuple(actions)), *programs[rank + 1 :])


def moved(programs: Programs, rank: int, text: str, before: str) -> Programs:
    """Put one action of one rank right before another one."""
    return edited(edited(programs, rank, text), rank, before, text, before)


def broken_law(text: str, programs: Programs) -> tuple[str, int, str | None]:
    """Check the programs of the plan and give the law that is reported, with rank and action."""
    with pytest.raises(LawError) as caught:
        check_laws(parse_plan(text), programs, target_blocks=last_block(text))
    return caught.value.law, caught.value.rank, caught.value.action and str(caught.value.action)


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("text", [FRACTIONAL, "0-1*3", "0|1-2*2", "0-1,T2|S2,3", "0,2|1", "0:1/2,2|0:1/2,1"])
def test_compiled_programs_are_lawful(text: str, update: bool) -> None:
    check_laws(parse_plan(text), programs_of(text, update=update), target_blocks=last_block(text))


@pytest.mark.parametrize(
    ("rank", "action", "law"),
    [
        (0, "LOAD rows=0:8", "loaded where taught"),
        (0, "TEACH block=1 rows=0:2", "taught once"),
        (1, "LEARN block=2 rows=0:8", "learned once"),
        (0, "REDUCE block=1 ranks=0,1", "reduced by its sharers"),
        (1, "UPDATE block=2", "updated once"),
    ],
)
def test_missing_action_breaks_its_law_on_its_rank(rank: int, action: str, law: str) -> None:
    assert broken_law(FRACTIONAL, edited(programs_of(FRACTIONAL), rank, action)) == (law, rank, None)


@pytest.mark.parametrize(
    ("rank", "action", "law"),
    [
        (0, "LOAD rows=0:8", "loaded where taught"),
        (0, "TEACH block=1 rows=0:2", "taught once"),
        (0, "SEND boundary=2 rows=0:2 to=1", "a receive for each send"),
        (1, "LEARN block=2 rows=0:8", "learned once"),
        (0, "REDUCE block=1 ranks=0,1", "reduced by its sharers"),
        (1, "UPDATE block=2", "updated once"),
    ],
)
def test_action_done_twice_breaks_its_law(rank: int, action: str, law: str) -> None:
    assert broken_law(FRACTIONAL, edited(programs_of(FRACTIONAL), rank, action, action, action)) == (law, rank, action)


def test_receive_done_twice_breaks_the_law_of_its_one_send() -> None:
    receive = "RECV boundary=2 rows=0:2 from=0"
    programs = edited(programs_of(FRACTIONAL), 1, receive, receive, receive)
    assert broken_law(FRACTIONAL, programs) == ("a receive for each send", 0, "SEND boundary=2 rows=0:2 to=1")


def test_same_rows_sent_and_received_twice_break_the_law_of_one_message() -> None:
    send, receive = "SEND boundary=2 rows=0:2 to=1", "RECV boundary=2 rows=0:2 from=0"
    programs = edited(edited(programs_of(FRACTIONAL), 0, send, send, send), 1, receive, receive, receive)
    assert broken_law(FRACTIONAL, programs) == ("a receive for each send", 0, send)


def test_receive_without_its_send_is_named() -> None:
    programs = edited(programs_of(FRACTIONAL), 0, "SEND boundary=2 rows=0:2 to=1")
    assert broken_law(FRACTIONAL, programs) == ("a send for each receive", 1, "RECV boundary=2 rows=0:2 from=0")


def test_send_without_its_receive_is_named() -> None:
    programs = edited(programs_of(FRACTIONAL), 1, "RECV boundary=2 rows=0:2 from=0")
    assert broken_law(FRACTIONAL, programs) == ("a receive for each send", 0, "SEND boundary=2 rows=0:2 to=1")


@pytest.mark.parametrize(
    "other",
    [
        "SEND boundary=2 rows=0:1 to=1",
        "SEND boundary=1 rows=0:2 to=1",
        "SEND boundary=2 rows=0:2 to=0",
        "SEND boundary=targets rows=0:2 to=1",
    ],
)
def test_send_of_another_boundary_or_rows_or_to_another_rank_is_named(other: str) -> None:
    programs = edited(programs_of(FRACTIONAL), 0, "SEND boundary=2 rows=0:2 to=1", other)
    assert broken_law(FRACTIONAL, programs) == ("a receive for each send", 0, other)


@pytest.mark.parametrize(
    ("rank", "action", "before", "law"),
    [
        (0, "SEND boundary=1 rows=2:8 to=1", "TEACH block=0 rows=0:8", "rows are present"),
        (0, "SEND boundary=targets rows=0:8 to=1", "LOAD rows=0:8", "rows are present"),
        (0, "TEACH block=1 rows=0:2", "TEACH block=0 rows=0:8", "rows are present"),
        (1, "TEACH block=2 rows=0:8", "RECV boundary=2 rows=0:2 from=0", "rows are present"),
        (1, "LEARN block=2 rows=0:8", "RECV boundary=targets rows=0:8 from=0", "rows are present"),
        (0, "LEARN block=0 rows=0:8", "LOAD rows=0:8", "rows are present"),
        (0, "LEARN block=1 rows=0:2", "TEACH block=1 rows=0:2", "teacher before learner"),
        (0, "LEARN block=0 rows=0:8", "TEACH block=0 rows=0:8", "teacher before learner"),
    ],
)
def test_action_before_the_one_that_brings_its_rows_is_named(rank: int, action: str, before: str, law: str) -> None:
    assert broken_law(FRACTIONAL, moved(programs_of(FRACTIONAL), rank, action, before)) == (law, rank, action)


def test_rows_that_are_only_partly_there_are_not_there() -> None:
    programs = edited(programs_of(FRACTIONAL), 1, "RECV boundary=2 rows=0:2 from=0", "RECV boundary=2 rows=0:1 from=0")
    programs = edited(programs, 0, "SEND boundary=2 rows=0:2 to=1", "SEND boundary=2 rows=0:1 to=1")
    plan = parse_plan(FRACTIONAL)
    with pytest.raises(
        LawError,
        match=r"`programs\[1\].actions\[3\]` \(TEACH block=2 rows=0:8\) must obey the law 'rows are present', "
        r"but of boundary 2 the rows 0:1, 2:8 are there \(rank 1\). Compile all programs from one plan",
    ):
        check_laws(plan, programs, target_blocks=[2])


def test_labels_that_did_not_travel_are_named_as_labels() -> None:
    with pytest.raises(LawError, match=r"LEARN block=1 rows=0:8.* but of the labels the rows none are there"):
        check_laws(parse_plan("0|1"), compile_programs(parse_plan("0|1"), 8), target_blocks=[1])


@pytest.mark.parametrize("rows", ["0:3", "0:1", "1:3"])
@pytest.mark.parametrize(("kind", "law"), [("TEACH", "taught once"), ("LEARN", "learned once")])
def test_other_rows_than_the_plan_gives_to_the_rank_are_named(kind: str, law: str, rows: str) -> None:
    action = f"{kind} block=1 rows={rows}"
    programs = edited(programs_of(FRACTIONAL), 0, f"{kind} block=1 rows=0:2", action)
    assert broken_law(FRACTIONAL, programs) == (law, 0, action)


def test_job_that_the_plan_gives_to_another_rank_is_named() -> None:
    programs = edited(programs_of("0|1"), 0, "UPDATE block=0", "LEARN block=1 rows=0:8", "UPDATE block=0")
    assert broken_law("0|1", programs) == ("learned once", 0, "LEARN block=1 rows=0:8")


def test_job_done_in_two_parts_is_lawful() -> None:
    learn = ("LEARN block=0 rows=0:8", "LEARN block=0 rows=0:3", "LEARN block=0 rows=3:8")
    check_laws(parse_plan("0|1"), edited(programs_of("0|1"), 0, *learn))


@pytest.mark.parametrize("ranks", ["0,2", "1,0", "0"])
def test_reduce_among_other_ranks_than_the_sharers_is_named(ranks: str) -> None:
    action = f"REDUCE block=1 ranks={ranks}"
    programs = edited(programs_of(FRACTIONAL), 0, "REDUCE block=1 ranks=0,1", action)
    assert broken_law(FRACTIONAL, programs) == ("reduced by its sharers", 0, action)


def test_reduce_of_a_block_with_one_rank_is_named() -> None:
    action = "REDUCE block=0 ranks=0"
    programs = edited(programs_of(FRACTIONAL), 0, "UPDATE block=0", action, "UPDATE block=0")
    assert broken_law(FRACTIONAL, programs) == ("reduced by its sharers", 0, action)


def test_reduce_before_its_learn_is_named() -> None:
    learn = "LEARN block=1 rows=0:2"
    programs = moved(programs_of(FRACTIONAL), 0, "REDUCE block=1 ranks=0,1", learn)
    assert broken_law(FRACTIONAL, programs) == ("reduced by its sharers", 0, learn)


def test_reduces_in_another_order_on_one_rank_are_named() -> None:
    programs = programs_of("0-1*2")
    for earlier in ("TEACH block=1 rows=4:8", "LEARN block=1 rows=4:8"):
        programs = moved(programs, 1, earlier, "REDUCE block=0 ranks=0,1")
    programs = moved(programs, 1, "REDUCE block=1 ranks=0,1", "REDUCE block=0 ranks=0,1")
    assert broken_law("0-1*2", programs) == ("one order of reduces", 1, "REDUCE block=0 ranks=0,1")


@pytest.mark.parametrize("later", ["LEARN block=1 rows=2:8", "REDUCE block=1 ranks=0,1"])
def test_update_before_learning_or_reducing_is_named(later: str) -> None:
    programs = moved(programs_of(FRACTIONAL), 1, "UPDATE block=1", later)
    assert broken_law(FRACTIONAL, programs) == ("updated once", 1, later)


def test_update_of_a_block_that_is_trained_elsewhere_is_named() -> None:
    programs = edited(programs_of("0|1"), 0, "UPDATE block=0", "UPDATE block=0", "UPDATE block=1")
    assert broken_law("0|1", programs) == ("updated once", 0, "UPDATE block=1")


def test_reduce_before_a_send_that_its_other_member_waits_for_is_a_cycle_of_waits() -> None:
    text, send = "0:1/2|0:1/2,1", "SEND boundary=1 rows=0:4 to=1"
    programs = moved(programs_of(text), 0, "LEARN block=0 rows=0:4", send)
    programs = moved(programs, 0, "REDUCE block=0 ranks=0,1", send)
    assert broken_law(text, programs) == ("no cycle of waits", 0, "REDUCE block=0 ranks=0,1")


def test_receive_that_needs_a_later_send_of_its_own_rank_is_a_cycle_of_waits() -> None:
    receive = "RECV boundary=2 rows=0:8 from=1"
    programs = moved(programs_of("0,2|1"), 0, receive, "SEND boundary=1 rows=0:8 to=1")
    assert broken_law("0,2|1", programs) == ("no cycle of waits", 0, receive)


def test_number_of_programs_is_the_number_of_ranks() -> None:
    with pytest.raises(LawError, match="'one program per rank', but there are 1 programs for 2 ranks"):
        check_laws(parse_plan("0|1"), programs_of("0|1")[:1])


def test_programs_in_another_order_than_ranks_are_refused() -> None:
    with pytest.raises(LawError, match=r"`programs\[0\]` must .* but it is the program of rank 1"):
        check_laws(parse_plan("0|1"), programs_of("0|1")[::-1])


def test_programs_of_different_batches_are_refused() -> None:
    short = compile_programs(parse_plan("0|1"), 5)
    with pytest.raises(LawError, match="but it is for 5 rows and that of rank 0 for 8"):
        check_laws(parse_plan("0|1"), (programs_of("0|1")[0], short[1]))
