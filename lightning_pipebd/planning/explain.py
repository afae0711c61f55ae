"""The explanation: what a plan does, what travels, and how exactly it reproduces one process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import lcm
from typing import NamedTuple

from lightning_pipebd.planning.ahead import teaches_ahead
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.program import TARGETS
from lightning_pipebd.planning.quantities import format_bytes
from lightning_pipebd.planning.routing import moved_rows
from lightning_pipebd.planning.table import align_columns

__all__ = ["BlockTraits", "Exactness", "ExactnessReason", "exactness_of", "exactness_reasons", "explain_plan"]


_SAME_BITS = "Every job has one rank: the student gets the bits of one process."
_AHEAD = "teacher blocks work one batch ahead: rows come round, and nobody waits for them"


class Exactness(str, Enum):
    """How closely a plan reproduces the student that one process would train.

    `bitwise`: every bit. `summation`: the same mathematics, added in another order. `statistics`: other mathematics,
    since a rank sees the statistics, or the random draws, of its own rows only.
    """

    BITWISE = "bitwise"
    SUMMATION = "summation"
    STATISTICS = "statistics"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTraits:
    """What explaining a plan has to know about one block.

    Args:
        name: Name to print, such as the module path.
        has_batch_statistics: Whether the student block computes statistics over the batch, as BatchNorm does.
        is_stochastic: Whether the student block draws random numbers, as dropout does.
        boundary_bytes_per_row: Bytes per row of the activation the teacher block produces; `None` if unknown.
        is_synchronised: Whether those statistics are taken over the rows of all ranks that share the block.
        couples_rows: Whether the block's loss was found to be no mean over rows, for whatever reason.
    """

    name: str
    has_batch_statistics: bool = False
    is_stochastic: bool = False
    boundary_bytes_per_row: int | None = None
    is_synchronised: bool = False
    couples_rows: bool = False


class ExactnessReason(NamedTuple):
    """Why one block is not reproduced bitwise."""

    block: int
    exactness: Exactness
    sentence: str


def exactness_of(plan: Plan, traits: Sequence[BlockTraits] = ()) -> Exactness:
    """Name the plan's class of exactness: that of its least exact block.

    Args:
        plan: The plan to judge.
        traits: One entry per block; empty if nothing is known, which reads as no statistics and no random draws.

    Raises:
        ValueError: `traits` is neither empty nor as long as the plan has blocks.

    Example:
        >>> str(exactness_of(Plan.straight([1, 1]))), str(exactness_of(Plan.joint(2, 2)))
        ('bitwise', 'summation')
    """
    found = {reason.exactness for reason in exactness_reasons(plan, traits)}
    return next((level for level in (Exactness.STATISTICS, Exactness.SUMMATION) if level in found), Exactness.BITWISE)


def exactness_reasons(plan: Plan, traits: Sequence[BlockTraits] = ()) -> tuple[ExactnessReason, ...]:
    """List, block by block, everything that keeps the plan from being bitwise exact.

    Raises:
        ValueError: `traits` is neither empty nor as long as the plan has blocks.
    """
    known = _known_traits(plan, traits)
    return tuple(reason for block, trait in enumerate(known) for reason in _reasons(plan, block, trait))


def explain_plan(
    plan: Plan,
    traits: Sequence[BlockTraits] = (),
    *,
    num_rows: int | None = None,
    input_bytes_per_row: int | None = None,
    target_blocks: Collection[int] = (),
    has_momentum: bool = False,
) -> str:
    """Describe a plan for people: who computes what, what travels, who reduces with whom, how exact it is.

    Args:
        plan: The plan to explain.
        traits: One entry per block, for names, sizes and exactness; empty if nothing is known.
        num_rows: Rows of a batch; `None` prints shares of a batch instead of rows.
        input_bytes_per_row: Bytes per row of the model input; `None` if unknown.
        target_blocks: Student blocks whose loss reads the labels.
        has_momentum: Whether each teacher block follows its student block, and so never works ahead of it.

    Returns:
        Lines of text, without a line break at the end.

    Raises:
        ValueError: `traits` is neither empty nor as long as the plan has blocks.

    Example:
        >>> print(explain_plan(Plan.straight([1, 1]), num_rows=64))
        plan: 0|1 (2 blocks, 2 ranks)
        <BLANKLINE>
        job        rank 0  rank 1
        teacher 0  1       -
        student 0  1       -
        teacher 1  -       1
        student 1  -       1
        <BLANKLINE>
        relay per batch:
          rank 0 to rank 1: boundary 1, 64 of 64 rows
        reduce per batch: nothing
        exactness: bitwise
          Every job has one rank: the student gets the bits of one process.
    """
    known = _known_traits(plan, traits)
    name = format_plan(plan) if has_text_form(plan) else "(no text form)"
    sizes = {0: input_bytes_per_row} | {block + 1: trait.boundary_bytes_per_row for block, trait in enumerate(known)}
    sentences = [reason.sentence for reason in exactness_reasons(plan, traits)]
    return "\n".join(
        [
            f"plan: {name} ({plan.num_blocks} blocks, {plan.num_ranks} ranks)",
            "",
            *_job_lines(plan, known),
            "",
            *_section("relay per batch", list(_relay_lines(plan, num_rows, sizes, target_blocks))),
            *_section("reduce per batch", list(_reduce_lines(plan, known))),
            *([_AHEAD] if teaches_ahead(plan, has_momentum=has_momentum) else []),
            f"exactness: {exactness_of(plan, traits)}",
            *(f"  {line}" for line in sentences or [_SAME_BITS]),
        ]
    )


def _known_traits(plan: Plan, traits: Sequence[BlockTraits]) -> tuple[BlockTraits, ...]:
    if traits and len(traits) != plan.num_blocks:
        raise ValueError(
            f"`traits` must be empty or have one entry per block, but has {len(traits)} entries for "
            f"{plan.num_blocks} blocks. Describe every block."
        )
    return tuple(traits) or tuple(BlockTraits(name="") for _ in range(plan.num_blocks))


def _label(block: int, trait: BlockTraits) -> str:
    return f"{block} ({trait.name})" if trait.name else f"{block}"


def _reasons(plan: Plan, block: int, trait: BlockTraits) -> Iterator[ExactnessReason]:
    label = f"block {_label(block, trait)}"
    if len(plan.teacher[block]) > 1:
        yield ExactnessReason(
            block,
            Exactness.SUMMATION,
            f"{label}: {_ranks([rank for rank, _ in plan.teacher[block]])} share the teacher's rows; "
            "a kernel may add in another order for another number of rows (summation).",
        )
    if len(plan.student[block]) == 1:
        return
    sharers = f"{label}: {_ranks(plan.student_ranks(block))} share the student's rows; "
    is_affected = False
    if trait.has_batch_statistics and not trait.is_synchronised:
        is_affected = True
        yield ExactnessReason(
            block, Exactness.STATISTICS, f"{sharers}its batch statistics see one rank's rows only (statistics)."
        )
    if trait.is_stochastic:
        is_affected = True
        yield ExactnessReason(
            block, Exactness.STATISTICS, f"{sharers}its random draws differ from one process (statistics)."
        )
    if trait.couples_rows and not is_affected:
        is_affected = True
        yield ExactnessReason(
            block,
            Exactness.STATISTICS,
            f"{sharers}its loss is not the mean of those of parts of the rows (statistics).",
        )
    if not is_affected:
        yield ExactnessReason(
            block, Exactness.SUMMATION, f"{sharers}their gradients are added in another order (summation)."
        )


def _ranks(ranks: Sequence[int]) -> str:
    return f"ranks {', '.join(map(str, ranks))}"


def _job_lines(plan: Plan, traits: Sequence[BlockTraits]) -> list[str]:
    rows = [["job", *(f"rank {rank}" for rank in range(plan.num_ranks))]]
    for block, trait in enumerate(traits):
        for side, jobs in (("teacher", plan.teacher), ("student", plan.student)):
            shares = {rank: str(share) for rank, share in jobs[block]}
            rows.append([f"{side} {_label(block, trait)}", *(shares.get(rank, "-") for rank in range(plan.num_ranks))])
    return align_columns(rows)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else [f"{title}: nothing"]


def _relay_lines(
    plan: Plan, num_rows: int | None, sizes: dict[int, int | None], target_blocks: Collection[int]
) -> Iterator[str]:
    # In a batch of this many rows every cut falls between two rows, so rows are exact shares.
    exact_rows = lcm(*(share.denominator for shares in plan.teacher + plan.student for _, share in shares))
    moved = moved_rows(plan, num_rows or exact_rows, target_blocks=target_blocks)
    for (sender, receiver, boundary), rows in moved.items():
        name = "targets" if boundary == TARGETS else f"boundary {boundary}"
        size = sizes.get(boundary)
        if num_rows is None:
            share = "all rows" if rows == exact_rows else f"{Fraction(rows, exact_rows)} of the rows"
            part = share + (f", {format_bytes(size)} per row" if size else "")
        else:
            part = f"{rows} of {num_rows} rows" + (f", {format_bytes(size * rows)}" if size else "")
        yield f"rank {sender} to rank {receiver}: {name}, {part}"


def _reduce_lines(plan: Plan, traits: Sequence[BlockTraits]) -> Iterator[str]:
    for block, trait in enumerate(traits):
        if len(plan.student[block]) > 1:
            yield f"block {_label(block, trait)}: {_ranks(plan.student_ranks(block))}"
