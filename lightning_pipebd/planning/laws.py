"""The laws every set of programs obeys, checked without a process and without trusting the compiler.

The checker knows only the plan and the printed actions; how the compiler found them is not its business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from lightning_pipebd.planning.clock import clock_ticks
from lightning_pipebd.planning.pipeline_program import PipelineAction
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program
from lightning_pipebd.planning.routing import Message, merge_rows

__all__ = ["LawError", "check_laws"]


class LawError(ValueError):
    """Programs break a law of programs.

    Args:
        law: Name of the law.
        rank: Rank whose program breaks it.
        action_index: Position of the action in that program; `None` if an action is missing altogether.
        action: The action, for the message.
        found: What is there instead, as the end of "must obey ..., but".
    """

    def __init__(
        self, law: str, rank: int, action_index: int | None, action: Action | PipelineAction | None, found: str
    ) -> None:
        place = f"`programs[{rank}]`" if action_index is None else f"`programs[{rank}].actions[{action_index}]`"
        what = "" if action is None else f" ({action})"
        super().__init__(
            f"{place}{what} must obey the law '{law}', but {found} (rank {rank}). "
            "Compile all programs from one plan and one number of rows."
        )
        self.law = law
        self.rank = rank
        self.action_index = action_index
        self.action = action


def check_laws(plan: Plan, programs: Sequence[Program], *, target_blocks: Collection[int] = ()) -> None:
    """Refuse programs that would hang, compute something twice, or use what is not there.

    Programs without any UPDATE and REDUCE, for a batch that only accumulates gradients, are lawful.

    Args:
        plan: The plan the programs shall carry out.
        programs: One program per rank, index = rank, for one batch.
        target_blocks: Student blocks whose loss reads the labels.

    Raises:
        LawError: The first broken law, with rank and action: "one program per rank", "loaded where taught", "taught
            once", "learned once", "a receive for each send", "a send for each receive", "rows are present", "teacher
            before learner", "reduced by its sharers", "one order of reduces", "updated once", "no cycle of waits".
    """
    _check_programs(plan, programs)
    _check_jobs(plan, programs)
    _check_messages(programs)
    for program in programs:
        _check_presence(program, target_blocks)
    if any(action.kind in (Kind.REDUCE, Kind.UPDATE) for program in programs for action in program.actions):
        for program in programs:
            _check_reduces(plan, program)
            _check_updates(plan, program)
    _check_waits(programs)


def _check_programs(plan: Plan, programs: Sequence[Program]) -> None:
    law = "one program per rank"
    if len(programs) != plan.num_ranks:
        found = f"there are {len(programs)} programs for {plan.num_ranks} ranks"
        raise LawError(law, min(len(programs), plan.num_ranks), None, None, found)
    for rank, program in enumerate(programs):
        if program.rank != rank:
            raise LawError(law, rank, None, None, f"it is the program of rank {program.rank}")
        if program.num_rows != programs[0].num_rows:
            found = f"it is for {program.num_rows} rows and that of rank 0 for {programs[0].num_rows}"
            raise LawError(law, rank, None, None, found)


def _check_jobs(plan: Plan, programs: Sequence[Program]) -> None:
    num_rows = programs[0].num_rows
    for program in programs:
        planned = {
            **{(Kind.TEACH, block): plan.teacher_rows(block, num_rows) for block in range(plan.num_blocks)},
            **{(Kind.LEARN, block): plan.student_rows(block, num_rows) for block in range(plan.num_blocks)},
            (Kind.LOAD, 0): plan.teacher_rows(0, num_rows),
        }
        done: dict[tuple[Kind, int], list[int]] = {}
        for position, action in enumerate(program.actions):
            if action.kind in _ONCE:
                done.setdefault((action.kind, action.index), []).append(position)
        for kind, block in planned | done:
            rows = planned.get((kind, block), {}).get(program.rank, Rows(0, 0))
            positions = done.get((kind, block), [])
            parts = [program.actions[position].rows for position in positions]
            # Equal sums and equal unions leave no room for a row done twice.
            if sum(part.num_rows for part in parts) != rows.num_rows or any(r != rows for r in merge_rows(parts)):
                found = f"{kind} {block} has rows {', '.join(map(str, parts)) or 'none'} where the plan has {rows}"
                last = positions[-1] if positions else None
                raise LawError(_ONCE[kind], program.rank, last, None if last is None else program.actions[last], found)


def _check_messages(programs: Sequence[Program]) -> None:
    moves = {kind: list(_messages(programs, kind)) for kind in (Kind.SEND, Kind.RECV)}
    for kind, other, law in (
        (Kind.SEND, Kind.RECV, "a receive for each send"),
        (Kind.RECV, Kind.SEND, "a send for each receive"),
    ):
        counts = Counter(message for message, _, _ in moves[kind])
        other_counts = Counter(message for message, _, _ in moves[other])
        for message, rank, position in moves[kind]:
            if counts[message] != 1 or other_counts[message] != 1:
                found = f"there are {counts[message]} such {kind} and {other_counts[message]} such {other}"
                raise LawError(law, rank, position, programs[rank].actions[position], found)


def _messages(programs: Sequence[Program], kind: Kind) -> Iterator[tuple[Message, int, int]]:
    for program in programs:
        for position, action in enumerate(program.actions):
            if action.kind is kind:
                ends = (program.rank, action.peer) if kind is Kind.SEND else (action.peer, program.rank)
                yield Message(action.index, action.rows, *ends), program.rank, position


def _check_presence(program: Program, target_blocks: Collection[int]) -> None:
    present: dict[int, list[Rows]] = {}
    for position, action in enumerate(program.actions):
        for boundary, law in _reads(action, target_blocks):
            if not any(rows.contains(action.rows) for rows in merge_rows(present.get(boundary, []))):
                name = "the labels" if boundary == TARGETS else f"boundary {boundary}"
                there = ", ".join(map(str, merge_rows(present.get(boundary, [])))) or "none"
                found = f"of {name} the rows {there} are there"
                raise LawError(law, program.rank, position, action, found)
        for boundary in _makes(action):
            present.setdefault(boundary, []).append(action.rows)


def _reads(action: Action, target_blocks: Collection[int]) -> Iterator[tuple[int, str]]:
    """List the boundaries whose rows the action uses, each with the law that asks for them."""
    if action.kind in (Kind.TEACH, Kind.SEND, Kind.LEARN):
        yield action.index, "rows are present"
    if action.kind is Kind.LEARN:
        yield action.index + 1, "teacher before learner"
        if action.index in target_blocks:
            yield TARGETS, "rows are present"


def _makes(action: Action) -> tuple[int, ...]:
    if action.kind is Kind.LOAD:
        return 0, TARGETS
    if action.kind is Kind.TEACH:
        return (action.index + 1,)
    return (action.index,) if action.kind is Kind.RECV else ()


def _check_reduces(plan: Plan, program: Program) -> None:
    latest = -1
    due = {block for block in _local_students(plan, program.rank) if len(plan.student_ranks(block)) > 1}
    for position, action in enumerate(program.actions):
        if action.kind is Kind.REDUCE:
            if action.index not in due or action.ranks != plan.student_ranks(action.index):
                found = f"the plan wants these REDUCEs on this rank besides the earlier ones: {sorted(due)}"
                raise LawError("reduced by its sharers", program.rank, position, action, found)
            if action.index < latest:
                found = f"it follows the REDUCE of block {latest}; ranks that differ here wait for each other"
                raise LawError("one order of reduces", program.rank, position, action, found)
            due.remove(action.index)
            latest = action.index
        elif action.kind is Kind.LEARN and len(plan.student_ranks(action.index)) > 1 and action.index not in due:
            found = "the block was reduced before"
            raise LawError("reduced by its sharers", program.rank, position, action, found)
    if due:
        found = f"it has no REDUCE of block {min(due)}"
        raise LawError("reduced by its sharers", program.rank, None, None, found)


def _check_updates(plan: Plan, program: Program) -> None:
    law = "updated once"
    due = set(_local_students(plan, program.rank))
    for position, action in enumerate(program.actions):
        if action.kind is Kind.UPDATE:
            if action.index not in due:
                found = "the block was updated before or is trained elsewhere"
                raise LawError(law, program.rank, position, action, found)
            due.remove(action.index)
        elif action.kind in (Kind.LEARN, Kind.REDUCE) and action.index not in due:
            raise LawError(law, program.rank, position, action, "the block was updated before")
    if due:
        raise LawError(law, program.rank, None, None, f"it has no UPDATE of block {min(due)}")


def _local_students(plan: Plan, rank: int) -> list[int]:
    return [block for block in range(plan.num_blocks) if rank in plan.student_ranks(block)]


def _check_waits(programs: Sequence[Program]) -> None:
    for program, ticks in zip(programs, clock_ticks(programs), strict=True):
        if len(ticks) < len(program.actions):
            position = len(ticks)
            found = "it waits for ever"
            raise LawError("no cycle of waits", program.rank, position, program.actions[position], found)


_ONCE = {Kind.LOAD: "loaded where taught", Kind.TEACH: "taught once", Kind.LEARN: "learned once"}
