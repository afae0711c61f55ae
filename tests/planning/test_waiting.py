"""When a rank learns instead of waiting, judged from the printed programs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program
from tests.helpers.plans import batches

Batch = tuple[Plan, int, frozenset[int]]

#: Position of an action: rank and place in its program.
Place = tuple[int, int]


def send_of(programs: Sequence[Program], receiver: int, receive: Action) -> Place:
    send = Action(Kind.SEND, receive.index, receive.rows, peer=receiver)
    return receive.peer, programs[receive.peer].actions.index(send)


def is_round_trip(programs: Sequence[Program], rank: int, receive: Action) -> bool:
    """Tell whether the action receives what can be sent only after its sender has heard from the receiver."""
    if receive.kind is not Kind.RECV:
        return False
    waiting, seen = [send_of(programs, rank, receive)], set[Place]()
    while waiting:
        sender, end = waiting.pop()
        for place, action in enumerate(programs[sender].actions[:end]):
            if action.kind is not Kind.RECV or (sender, place) in seen:
                continue
            seen.add((sender, place))
            if action.peer == rank:
                return True
            waiting.append(send_of(programs, sender, action))
    return False


def present_rows(actions: Sequence[Action]) -> set[tuple[int, int]]:
    """List (boundary, row) of everything that is on the rank after these actions."""
    present: set[tuple[int, int]] = set()
    for action in actions:
        makes = {Kind.LOAD: (0, TARGETS), Kind.TEACH: (action.index + 1,), Kind.RECV: (action.index,)}
        rows = range(action.rows.start, action.rows.stop)
        present |= {(boundary, row) for boundary in makes.get(action.kind, ()) for row in rows}
    return present


def needed_rows(learn: Action, target_blocks: frozenset[int]) -> set[tuple[int, int]]:
    boundaries = (learn.index, learn.index + 1, *([TARGETS] if learn.index in target_blocks else []))
    return {(boundary, row) for boundary in boundaries for row in range(learn.rows.start, learn.rows.stop)}


def missed_chances(program: Program, end: int, target_blocks: frozenset[int]) -> Iterator[Action]:
    """List what the rank could have learned before its action at `end`, but learns later."""
    present = present_rows(program.actions[:end])
    for action in program.actions[end:]:
        if action.kind is Kind.LEARN and needed_rows(action, target_blocks) <= present:
            yield action


@given(batch=batches())
def test_rank_learns_all_it_can_before_it_waits_for_its_own_rows_to_come_round(batch: Batch) -> None:
    plan, num_rows, target_blocks = batch
    programs = compile_programs(plan, num_rows, target_blocks=target_blocks)
    missed = [
        (str(action), [str(learn) for learn in missed_chances(program, place, target_blocks)])
        for program in programs
        for place, action in enumerate(program.actions)
        if is_round_trip(programs, program.rank, action)
        # Neighbouring receives are one wait: what the first brings is not learned before the second.
        and not is_round_trip(programs, program.rank, program.actions[place - 1])
    ]
    assert [entry for entry in missed if entry[1]] == []


@given(batch=batches())
def test_rank_learns_before_teacher_work_that_others_wait_for_only_to_wait_for_its_own_rows(batch: Batch) -> None:
    plan, num_rows, target_blocks = batch
    programs = compile_programs(plan, num_rows, target_blocks=target_blocks)
    for program in programs:
        for place, action in enumerate(program.actions):
            rest = [later for later in program.actions[place:] if later.kind is not Kind.LEARN]
            if action.kind is Kind.LEARN and any(later.kind is Kind.SEND for later in rest):
                assert is_round_trip(programs, program.rank, rest[0]), program


@given(batch=batches())
def test_rank_learns_all_it_can_before_it_teaches_what_nobody_else_waits_for(batch: Batch) -> None:
    plan, num_rows, target_blocks = batch
    programs = compile_programs(plan, num_rows, target_blocks=target_blocks)
    for program in programs:
        teaching = [place for place, action in enumerate(program.actions) if action.kind is Kind.TEACH]
        talking = [place for place, action in enumerate(program.actions) if action.kind is Kind.SEND]
        # What is received for a student block alone keeps nobody from teaching first.
        talking += [place for place in teaching[1:] if program.actions[place - 1].kind is Kind.RECV]
        for place in teaching:
            if place > max(talking, default=-1):
                assert list(missed_chances(program, place, target_blocks)) == [], program


def test_round_trip_is_told_from_a_way_that_only_passes_by() -> None:
    there_and_back = compile_programs(Plan.from_dict(_plan("0", "1", "0")), 2)
    assert is_round_trip(there_and_back, 0, Action(Kind.RECV, 2, Rows(0, 2), peer=1))
    one_way = compile_programs(Plan.from_dict(_plan("0", "1", "2")), 2)
    assert not is_round_trip(one_way, 2, Action(Kind.RECV, 2, Rows(0, 2), peer=1))


def _plan(*ranks: str) -> dict[str, object]:
    jobs = [[[int(rank), "1"]] for rank in ranks]
    return {"num_ranks": 3, "teacher": jobs, "student": jobs}
