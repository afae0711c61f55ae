"""The text form of plans, as people write it on a command line.

    text   = [ "ahead" ] stage { "|" stage }  the stages in turn take the next ranks
    stage  = ( "-" | item { "," item } ) [ "*" ranks ]
    item   = [ "T" | "S" ] first [ "-" last ] [ ":" share ]

An item without letter is both jobs of its blocks, `T2` only the teacher's, `S2` only the student's. A stage has the
whole of its blocks unless a share is written. `*2` divides that evenly among two ranks. `-` is a rank without a job.
`ahead` lets teacher blocks work one batch ahead where rows come round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

from lightning_pipebd.planning.plan import Plan, PlanError, Share

__all__ = ["format_plan", "has_text_form", "parse_plan"]

_ITEM = re.compile(r"(?P<side>[TS]?)(?P<first>\d+)(-(?P<last>\d+))?(:(?P<share>\d+(/\d+)?))?")
_JOINT = re.compile(r"joint(\*(?P<ranks>\d+))?")
_AHEAD = re.compile(r"\s*ahead\s")
_FORMS = "`2`, `0-3`, `T2`, `S0-3`, `2:1/4`, or `-` alone for a rank without a job"


def parse_plan(text: str, *, num_blocks: int | None = None) -> Plan:
    """Read a plan from its text form; spaces are ignored.

    Args:
        text: Stages separated by `|`, such as `0-1*2|2,T3|S3` or `ahead 0,2|1`; or `joint*4`, every job evenly on four
            ranks.
        num_blocks: Blocks the plan must have; `None` takes the highest block in the text. `joint*4` needs it.

    Raises:
        PlanError: A token is not understood (named with its position), a job is missing or given away twice, or the
            blocks are not those of `num_blocks`. Or the plan itself is refused; see :class:`Plan`.

    Example:
        >>> parse_plan("0-1 | 2") == Plan.straight([2, 1])
        True
        >>> parse_plan("0,1:1/4 | 1:3/4").teacher[1]
        (Share(rank=0, share=Fraction(1, 4)), Share(rank=1, share=Fraction(3, 4)))
    """
    compact = "".join(text.split())
    if compact.startswith("joint"):
        return _parse_joint(compact, num_blocks)
    ahead = _AHEAD.match(text)
    jobs: dict[tuple[str, int], list[Share]] = {}
    num_ranks = 0
    for items, ranks in _stages(text, ahead.end() if ahead else 0):
        for item in items:
            for side, block in item.jobs():
                shares = jobs.setdefault((side, block), [])
                if any(share.rank >= num_ranks for share in shares):
                    raise item.token.error(
                        f"names the {_SIDES[side]} of block {block} twice", "Name it once per stage."
                    )
                shares += [Share(num_ranks + number, item.share / ranks) for number in range(ranks)]
        num_ranks += ranks
    _check_blocks(text, {block for _, block in jobs}, num_blocks)
    for (side, block), shares in sorted(jobs.items()):
        _check_sum(text, f"{_SIDES[side]} of block {block}", shares)
    return _assemble(text, jobs, num_ranks, teaches_ahead=ahead is not None)


def has_text_form(plan: Plan) -> bool:
    """Tell whether the text form can express the plan: every job lists its ranks in ascending order."""
    return all(list(shares) == sorted(shares) for shares in plan.teacher + plan.student)


def format_plan(plan: Plan) -> str:
    """Write the plan in its shortest text form, which `parse_plan` reads back.

    Raises:
        PlanError: The plan has no text form, see `has_text_form`.

    Example:
        >>> format_plan(Plan.hybrid([(3, 1), (1, 2)]))
        '0-2|3*2'
    """
    if not has_text_form(plan):
        raise PlanError(
            "`plan` must list the ranks of every job in ascending order to have a text form, but does not. "
            "Write `plan.to_dict()` to a YAML file instead."
        )
    ranks = [_shares_of(plan, rank) for rank in range(plan.num_ranks)]
    stages = []
    for shares, group in groupby(ranks):
        num_ranks = len(list(group))
        items = _format_items({job: share * num_ranks for job, share in shares.items()}, plan.num_blocks)
        stages.append(items + (f"*{num_ranks}" if num_ranks > 1 else ""))
    return ("ahead " if plan.teaches_ahead else "") + "|".join(stages)


_SIDES = {"T": "teacher", "S": "student"}


class _Token(NamedTuple):
    """A piece of the text with the position of its first character, counted from 1."""

    text: str
    position: int
    whole: str

    def error(self, found: str, remedy: str) -> PlanError:
        return PlanError(
            f"`plan` must be a plan text, but token {self.text!r} at character {self.position} {found} "
            f"(in {self.whole!r}). {remedy}"
        )


class _Item(NamedTuple):
    """One stage's share of some blocks' jobs."""

    token: _Token
    sides: str
    blocks: range
    share: Fraction

    def jobs(self) -> Iterator[tuple[str, int]]:
        for block in self.blocks:
            for side in self.sides:
                yield side, block


def _stages(text: str, start: int) -> Iterator[tuple[list[_Item], int]]:
    for stage in _split(_Token(text[start:], start + 1, text), "|"):
        body, star, count = stage.text.partition("*")
        ranks = 1
        if star:
            token = _strip(_Token(count, stage.position + len(body) + 1, text))
            if not token.text.isdecimal() or int(token.text) < 1:
                raise token.error("is not a number of ranks", "End a stage with `*2` to give it two ranks.")
            ranks = int(token.text)
        tokens = [_strip(token) for token in _split(stage._replace(text=body), ",")]
        is_idle = [token.text for token in tokens] == ["-"]
        yield [] if is_idle else [_parse_item(token) for token in tokens], ranks


def _split(token: _Token, separator: str) -> Iterator[_Token]:
    position = token.position
    for part in token.text.split(separator):
        yield _Token(part, position, token.whole)
        position += len(part) + 1


def _strip(token: _Token) -> _Token:
    lead = len(token.text) - len(token.text.lstrip())
    return token._replace(text=token.text.strip(), position=token.position + lead)


def _parse_item(token: _Token) -> _Item:
    # A forgotten separator must not glue two numbers into a third one.
    match = None if re.search(r"\d\s+\d", token.text) else _ITEM.fullmatch("".join(token.text.split()))
    if match is None:
        raise token.error("is not understood", f"Write {_FORMS}.")
    first = int(match["first"])
    last = int(match["last"] or first)
    if last < first:
        raise token.error("ends before it starts", f"Write `{last}-{first}`.")
    numerator, _, denominator = (match["share"] or "1").partition("/")
    if int(denominator or 1) == 0 or not 0 < Fraction(int(numerator), int(denominator or 1)) <= 1:
        raise token.error("has a share that is not above 0 and at most 1", "Write for example `2:1/4`.")
    share = Fraction(int(numerator), int(denominator or 1))
    return _Item(token, match["side"] or "TS", range(first, last + 1), share)


def _parse_joint(text: str, num_blocks: int | None) -> Plan:
    match = _JOINT.fullmatch(text)
    if match is None or not match["ranks"]:
        raise PlanError(f"`plan` must say how many ranks are joint, but is {text!r}. Write for example `joint*4`.")
    if num_blocks is None:
        raise PlanError(
            f"`plan` must name its blocks where their number is not known, but is {text!r}. "
            f"Give `num_blocks`, or write for example `0-3*{match['ranks']}`."
        )
    if int(match["ranks"]) < 1:
        raise PlanError(f"`plan` must have at least 1 rank, but is {text!r}. Write for example `joint*4`.")
    return Plan.joint(num_blocks, int(match["ranks"]))


def _check_blocks(text: str, blocks: set[int], num_blocks: int | None) -> None:
    if not blocks:
        raise PlanError(f"`plan` must name blocks, but is {text!r}. Write for example `0-1|2-3`.")
    if num_blocks is not None and max(blocks) >= num_blocks:
        raise PlanError(
            f"`plan` must name blocks from 0 to {num_blocks - 1}, but names block {max(blocks)} (in {text!r}). "
            f"The models have {num_blocks} blocks; correct the plan or the block map."
        )
    expected = max(blocks) + 1 if num_blocks is None else num_blocks
    if missing := sorted(set(range(expected)) - blocks):
        raise PlanError(
            f"`plan` must name every block from 0 to {expected - 1}, but block {missing[0]} is missing (in {text!r}). "
            "Add it to a stage."
        )


def _check_sum(text: str, job: str, shares: list[Share]) -> None:
    total = sum((share for _, share in shares), Fraction(0))
    if total != 1:
        ranks = ", ".join(f"rank {rank}: {share}" for rank, share in shares)
        raise PlanError(
            f"`plan` must give away the {job} exactly once, but its shares sum to {total} ({ranks}; in {text!r}). "
            "Write the share of each stage, for example `2:1/4`."
        )


def _assemble(text: str, jobs: Mapping[tuple[str, int], list[Share]], num_ranks: int, *, teaches_ahead: bool) -> Plan:
    sides: dict[str, list[tuple[Share, ...]]] = {"T": [], "S": []}
    for block in range(max(block for _, block in jobs) + 1):
        for side, shares in sides.items():
            if (side, block) not in jobs:
                raise PlanError(
                    f"`plan` must give away the {_SIDES[side]} of block {block}, but names only its other job "
                    f"(in {text!r}). Add `{side}{block}` to a stage."
                )
            shares.append(tuple(jobs[side, block]))
    teacher, student = tuple(sides["T"]), tuple(sides["S"])
    return Plan(num_ranks=num_ranks, teacher=teacher, student=student, teaches_ahead=teaches_ahead)


def _shares_of(plan: Plan, rank: int) -> dict[tuple[str, int], Fraction]:
    return {
        (side, block): share
        for side, jobs in (("T", plan.teacher), ("S", plan.student))
        for block, shares in enumerate(jobs)
        for owner, share in shares
        if owner == rank
    }


def _format_items(shares: Mapping[tuple[str, int], Fraction], num_blocks: int) -> str:
    """Join neighbouring blocks with the same letter and share to ranges."""
    runs: list[tuple[int, str, int, Fraction]] = []
    for side in ("", "T", "S"):
        for block in range(num_blocks):
            share = _written_share(shares, side, block)
            if share is None:
                continue
            if runs and runs[-1][1:] == (side, block - 1, share):
                runs[-1] = (runs[-1][0], side, block, share)
            else:
                runs.append((block, side, block, share))
    items = []
    for first, side, last, share in sorted(runs, key=lambda run: (run[0], run[1] == "S")):
        blocks = f"{first}" if first == last else f"{first}-{last}"
        items.append(f"{side}{blocks}" + ("" if share == 1 else f":{share}"))
    return ",".join(items) or "-"


def _written_share(shares: Mapping[tuple[str, int], Fraction], side: str, block: int) -> Fraction | None:
    """Give the share to write behind this letter; two equal jobs of a block are written once, without letter."""
    teacher, student = shares.get(("T", block)), shares.get(("S", block))
    if side == "":
        return teacher if teacher == student else None
    if teacher == student:
        return None
    return teacher if side == "T" else student
