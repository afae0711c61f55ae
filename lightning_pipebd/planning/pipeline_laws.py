"""The laws of the programs of an end-to-end training, checked without a process and without trusting the compiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lightning_pipebd.planning.laws import LawError
from lightning_pipebd.planning.pipeline_compiler import PipelineStep
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import WORK, PipelineAction, PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.planning.routing import merge_rows

__all__ = ["check_pipeline_laws"]

_NOT_YET = "what it needs is not there yet"
_Thing = tuple[str, int, bool]  # what, block or boundary, whether it is the next batch's


def check_pipeline_laws(plan: PipelinePlan, programs: Sequence[PipelineProgram], step: PipelineStep) -> None:
    """Refuse programs that would hang, compute something twice or never, or use what is not there.

    Args:
        plan: The plan the programs shall carry out.
        programs: One program per rank, index = rank.
        step: What the programs shall do.

    Raises:
        LawError: The first broken law, with rank and action: "one program per rank", "work where the plan says", "each
            micro-batch once", "one batch after the other", "a receive for each send", "a send for each receive",
            "nothing before its input", "summed once, after backward", "updated once, after backward", "the teacher
            follows after the update", "no cycle of waits".
    """
    _check_programs(plan, programs, step)
    _check_work(plan, programs, step)
    _check_messages(programs)
    for program in programs:
        _check_inputs(plan, program, step)
        _check_sums(plan, program, step)
        _check_end(plan, program, step)
    _check_waits(programs)


def _check_programs(plan: PipelinePlan, programs: Sequence[PipelineProgram], step: PipelineStep) -> None:
    law = "one program per rank"
    if len(programs) != plan.num_ranks:
        found = f"there are {len(programs)} programs for {plan.num_ranks} ranks"
        raise LawError(law, min(len(programs), plan.num_ranks), None, None, found)
    for rank, program in enumerate(programs):
        if (program.rank, program.num_rows, program.num_next_rows) != (rank, step.num_rows, step.num_next_rows):
            found = f"it is for rank {program.rank}, {program.num_rows} rows and {program.num_next_rows} next"
            raise LawError(law, rank, None, None, found)


def _check_work(plan: PipelinePlan, programs: Sequence[PipelineProgram], step: PipelineStep) -> None:
    backward = (
        (PipelineKind.BACKWARD_INPUT, PipelineKind.BACKWARD_WEIGHT)
        if step.splits_backward
        else (PipelineKind.BACKWARD,)
    )
    wanted: dict[tuple[int, _Thing], tuple[int, Rows]] = {}
    for replica in range(plan.replicas):
        own, following = plan.rows(replica, step.num_rows), plan.rows(replica, step.num_next_rows)
        first = replica * plan.ranks_per_replica
        if not (step.is_full_batch and replica):
            # Of a loss of the full batch there is one, in one piece, for all replicas.
            rows = Rows(0, step.num_rows) if step.is_full_batch else own
            wanted[replica, ("LOSS", 0, False)] = (first + plan.loss_rank, rows)
        for kind in (PipelineKind.FORWARD, *backward):
            for block, rank in enumerate(plan.student):
                wanted[replica, (kind.value, block, False)] = (first + rank, own)
        for block, rank in enumerate(plan.teacher):
            wanted[replica, ("TEACH", block, False)] = (first + rank, own if step.teaches_own else Rows(0, 0))
            wanted[replica, ("TEACH", block, True)] = (first + rank, following)
    done: dict[tuple[int, _Thing], list[Rows]] = {}
    for program in programs:
        replica, has_begun_next = plan.place(program.rank)[0], False
        for position, action in enumerate(program.actions):
            if action.kind not in WORK:
                continue
            if action.kind is PipelineKind.TEACH and not action.is_next and has_begun_next:
                found = "the rank has taught of the next batch before, for which a momentum teacher moves on"
                raise LawError("one batch after the other", program.rank, position, action, found)
            has_begun_next |= action.kind is PipelineKind.TEACH and action.is_next
            thing = (replica, (action.kind.value, action.index, action.is_next))
            rank, _ = wanted.get(thing, (-1, Rows(0, 0)))
            if rank != program.rank:
                found = "the plan has it on no rank" if rank < 0 else f"the plan has it on rank {rank}"
                raise LawError("work where the plan says", program.rank, position, action, found)
            done.setdefault(thing, []).append(action.rows)
    for thing, (rank, rows) in wanted.items():
        parts = done.get(thing, [])
        is_cut = step.is_full_batch and thing[1][0] == "LOSS" and len(parts) > 1
        if (
            is_cut
            or sum(part.num_rows for part in parts) != rows.num_rows
            or any(part != rows for part in merge_rows(parts))
        ):
            found = f"{thing[1][0]} of block {thing[1][1]} has rows {', '.join(map(str, parts)) or 'none'} of {rows}"
            raise LawError("each micro-batch once", rank, None, None, found)


def _check_messages(programs: Sequence[PipelineProgram]) -> None:
    moves = {kind: list(_messages(programs, kind)) for kind in (PipelineKind.SEND, PipelineKind.RECV)}
    for kind, other, law in (
        (PipelineKind.SEND, PipelineKind.RECV, "a receive for each send"),
        (PipelineKind.RECV, PipelineKind.SEND, "a send for each receive"),
    ):
        counts = Counter(message for message, _, _ in moves[kind])
        others = Counter(message for message, _, _ in moves[other])
        for message, rank, position in moves[kind]:
            if counts[message] != 1 or others[message] != 1:
                found = f"there are {counts[message]} such {kind} and {others[message]} such {other}"
                raise LawError(law, rank, position, programs[rank].actions[position], found)


def _messages(programs: Sequence[PipelineProgram], kind: PipelineKind) -> Iterator[tuple[tuple[object, ...], int, int]]:
    for program in programs:
        for position, action in enumerate(program.actions):
            if action.kind is kind:
                yield _message(program.rank, action), program.rank, position


def _message(rank: int, action: PipelineAction) -> tuple[object, ...]:
    ends = (rank, action.peer) if action.kind is PipelineKind.SEND else (action.peer, rank)
    return (action.stream, action.index, action.rows, action.is_next, *ends)


def _check_inputs(plan: PipelinePlan, program: PipelineProgram, step: PipelineStep) -> None:
    present: dict[_Thing, list[Rows]] = {}
    replica, rank = plan.place(program.rank)
    if rank == plan.loss_rank and not step.teaches_own and not (step.is_full_batch and replica):
        rows = Rows(0, step.num_rows) if step.is_full_batch else plan.rows(replica, step.num_rows)
        present[_thing(Stream.BOUNDARY, len(plan.teacher))] = [rows]
    if replica and rank == plan.loading_rank and not step.teaches_own:
        # They came with what the teacher saw of this batch, a step ahead.
        present |= {
            _thing(stream, 0): [plan.rows(replica, step.num_rows)] for stream in (Stream.HIDDEN, Stream.TARGETS)
        }
    for position, action in enumerate(program.actions):
        for thing in _needs(plan, action, step):
            if not any(rows.contains(action.rows) for rows in merge_rows(present.get(thing, []))):
                raise LawError("nothing before its input", program.rank, position, action, _NOT_YET)
        for thing in _makes(plan, action, step):
            present.setdefault(thing, []).append(action.rows)


def _thing(stream: Stream, index: int, is_next: bool = False) -> _Thing:
    return stream.word, index, is_next


def _needs(plan: PipelinePlan, action: PipelineAction, step: PipelineStep) -> Iterator[_Thing]:
    kind, index = action.kind, action.index
    if kind is PipelineKind.SEND and action.stream is Stream.INPUTS:
        yield _thing(Stream.BOUNDARY if action.is_next else Stream.HIDDEN, 0, action.is_next)
    elif kind is PipelineKind.SEND and action.stream is not Stream.WEIGHTS:
        yield _thing(action.stream, index, action.is_next)
    elif kind is PipelineKind.TEACH:
        yield _thing(Stream.BOUNDARY, index, action.is_next)
    elif kind is PipelineKind.FORWARD:
        yield _thing(Stream.HIDDEN, index)
    elif kind is PipelineKind.LOSS:
        yield _thing(Stream.HIDDEN, len(plan.student))
        yield _thing(Stream.BOUNDARY, len(plan.teacher))
        if step.has_targets:
            yield _thing(Stream.TARGETS, 0)
    elif kind in (PipelineKind.BACKWARD, PipelineKind.BACKWARD_INPUT):
        yield _thing(Stream.HIDDEN, index + 1)
        yield _thing(Stream.GRADIENT, index + 1)
    elif kind is PipelineKind.BACKWARD_WEIGHT:
        yield "input gradient", index, False


def _makes(plan: PipelinePlan, action: PipelineAction, step: PipelineStep) -> Iterator[_Thing]:
    kind, index = action.kind, action.index
    if kind is PipelineKind.LOAD or action.stream is Stream.INPUTS:
        if action.is_next or step.teaches_own:
            yield _thing(Stream.BOUNDARY, 0, action.is_next)
        if not action.is_next:
            yield _thing(Stream.HIDDEN, 0)
            yield _thing(Stream.TARGETS, 0)
    elif kind is PipelineKind.RECV:
        yield _thing(action.stream, index, action.is_next)
    elif kind is PipelineKind.TEACH:
        yield _thing(Stream.BOUNDARY, index + 1, action.is_next)
    elif kind is PipelineKind.FORWARD:
        yield _thing(Stream.HIDDEN, index + 1)
    elif kind is PipelineKind.LOSS:
        yield _thing(Stream.GRADIENT, len(plan.student))
    elif kind in (PipelineKind.BACKWARD, PipelineKind.BACKWARD_INPUT):
        yield _thing(Stream.GRADIENT, index)
        yield "input gradient", index, False


def _check_sums(plan: PipelinePlan, program: PipelineProgram, step: PipelineStep) -> None:
    """Check the sums over replicas: all of them in one order, so that ranks that share blocks meet in each."""
    law, rank = "summed once, after backward", plan.place(program.rank)[1]
    due = [block for block, owner in enumerate(plan.student) if owner == rank]
    due, summed = due if step.update and plan.replicas > 1 else [], set[int]()
    for position, action in enumerate(program.actions):
        if action.kind is PipelineKind.REDUCE:
            if not due or action.index != due[-1] or action.ranks != plan.sharing_ranks(rank):
                found = (
                    f"the next is block {due[-1]} over ranks {plan.sharing_ranks(rank)}" if due else "nothing is due"
                )
                raise LawError(law, program.rank, position, action, found)
            summed.add(due.pop())
        elif action.kind is PipelineKind.UPDATE and due:
            raise LawError(law, program.rank, position, action, f"block {due[-1]} was not summed")
        elif action.kind in (PipelineKind.BACKWARD, PipelineKind.BACKWARD_WEIGHT) and action.index in summed:
            raise LawError(law, program.rank, position, action, "the block was summed before")


def _check_end(plan: PipelinePlan, program: PipelineProgram, step: PipelineStep) -> None:
    """Check what follows the backwards: each block's update once, then the teacher's."""
    rank, updated, followed = program.rank, set[int](), set[int]()
    place = plan.place(rank)[1]
    arrived = {block for block, owner in enumerate(plan.student) if owner == place} if step.update else set()
    received: set[int] = set()
    for position, action in enumerate(program.actions):
        if action.kind is PipelineKind.UPDATE:
            if action.index in updated or action.index not in arrived:
                found = "the block was updated before, is trained elsewhere, or is not to be updated"
                raise LawError("updated once, after backward", rank, position, action, found)
            updated.add(action.index)
        elif action.kind in WORK and (updated or followed):
            raise LawError("updated once, after backward", rank, position, action, "a block was updated before")
        elif action.stream is Stream.WEIGHTS and action.kind is PipelineKind.RECV:
            received.add(action.index)
        elif action.kind is PipelineKind.EMA:
            has_weights = action.index in updated | received
            if not step.has_momentum or not has_weights or action.index in followed:
                found = "the student block's new weights are not there, or the teacher block has followed before"
                raise LawError("the teacher follows after the update", rank, position, action, found)
            followed.add(action.index)
    due = {block for block, owner in enumerate(plan.teacher) if owner == place}
    if updated != arrived:
        found = f"it has no UPDATE of block {min(arrived - updated)}"
        raise LawError("updated once, after backward", rank, None, None, found)
    if step.has_momentum and step.update and followed != due:
        found = f"it has no EMA of block {min(due - followed)}"
        raise LawError("the teacher follows after the update", rank, None, None, found)


def _check_waits(programs: Sequence[PipelineProgram]) -> None:
    places = [0] * len(programs)
    sent: set[tuple[object, ...]] = set()
    begun: set[tuple[int, int]] = set()
    has_moved = True
    while has_moved:
        has_moved = False
        for program in programs:
            while places[program.rank] < len(program.actions):
                action = program.actions[places[program.rank]]
                if action.kind is PipelineKind.RECV and _message(program.rank, action) not in sent:
                    break
                if action.kind is PipelineKind.UPDATE and not _awaited(program) <= begun:
                    break
                if action.kind is PipelineKind.SEND:
                    sent.add(_message(program.rank, action))
                if action.kind is PipelineKind.REDUCE:
                    begun.add((program.rank, action.index))
                places[program.rank] += 1
                has_moved = True
    for program, place in zip(programs, places, strict=True):
        if place < len(program.actions):
            raise LawError("no cycle of waits", program.rank, place, program.actions[place], "it waits for ever")


def _awaited(program: PipelineProgram) -> set[tuple[int, int]]:
    """Give what must have begun before a rank's first update: every sum it takes part in, on every rank."""
    sums = (action for action in program.actions if action.kind is PipelineKind.REDUCE)
    return {(rank, action.index) for action in sums for rank in action.ranks}
