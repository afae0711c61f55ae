"""Where every rank stands, who waits for whom, and which rank holds up a run that does not move any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Culprit", "Standing", "find_culprit", "format_standings"]


@dataclass(frozen=True)
class Standing:
    """What one rank tells the others of itself.

    Args:
        rank: The rank.
        host: Name of its machine.
        pid: Its process.
        blocks: Blocks that it teaches or learns, as text.
        step: The step that it works on; -1 before the first.
        place: What it does, as text: an action, loading, saving.
        position: Position of that action in the rank's program; -1 outside of a program.
        num_rows: Rows of the batch that the program is for.
        is_update: Whether the program ends with an update.
        waits_for: Ranks that it waits for.
        idle_s: Seconds since its last progress.
        bound_s: Seconds without progress at this place after which it counts as stalled.
        failure: What ended the rank, or the run; empty while it runs.
        blames: The rank that this happened to, when `failure` is set.
        is_stall: Whether nothing was raised anywhere, when `failure` is set.
        is_done: Whether it has finished its part in peace.
        bids: Its bids for the step after which requests are followed (see `runtime.step_agreement`), by kind.
    """

    rank: int
    host: str = ""
    pid: int = 0
    blocks: str = ""
    step: int = -1
    place: str = "starting"
    position: int = -1
    num_rows: int = 0
    is_update: bool = True
    waits_for: tuple[int, ...] = ()
    idle_s: float = 0.0
    bound_s: float = 0.0
    failure: str = ""
    blames: int = -1
    is_stall: bool = False
    is_done: bool = False
    bids: dict[str, list[int]] = field(default_factory=dict)


class Culprit(NamedTuple):
    """Why a run ends: the rank that holds it up, what is wrong with it, and whether it stalled, or failed."""

    rank: int
    reason: str
    is_stall: bool = True


def find_culprit(
    rank: int, standings: Mapping[int, Standing], silent_s: Mapping[int, float], silence_bound_s: float
) -> Culprit | None:
    """Find the rank that holds up the run, as seen from one rank; `None` while there is none.

    A rank that computes or loads for longer than its bound is stalled. One that waits is only if the chain of waiting
    leads to a stalled rank, or back to itself; so nobody is blamed for the slowness of another.

    Args:
        rank: The rank that judges.
        standings: The last known standing of every rank that was heard, the judging one included.
        silent_s: Seconds since the other ranks were last heard; a stopped or dead process says nothing.
        silence_bound_s: Seconds of silence after which a rank counts as stopped.

    Example:
        >>> one = Standing(0, waits_for=(1,), idle_s=31.0, bound_s=30.0)
        >>> two = Standing(1, place="LEARN 2 0:8", idle_s=32.0, bound_s=30.0)
        >>> find_culprit(0, {0: one, 1: two}, {1: 0.5}, 30.0)
        Culprit(rank=1, reason='has made no progress for 32.0 s', is_stall=True)
    """
    others = [standing for peer, standing in sorted(standings.items()) if peer != rank and not standing.is_done]
    failed = [standing for standing in others if standing.failure]
    if failed:
        first = min(failed, key=lambda standing: standing.blames != standing.rank)
        return Culprit(first.blames, first.failure, first.is_stall)
    for standing in others:
        if silent_s.get(standing.rank, 0.0) > silence_bound_s:
            return Culprit(standing.rank, f"has not been heard of for {silent_s[standing.rank]:.1f} s")
    if standings[rank].idle_s <= standings[rank].bound_s:
        return None
    return _follow(rank, standings)


def _follow(rank: int, standings: Mapping[int, Standing]) -> Culprit | None:
    chain = [rank]
    while True:
        standing = standings[chain[-1]]
        if not standing.waits_for:
            is_stalled = standing.idle_s > standing.bound_s
            reason = f"has made no progress for {standing.idle_s:.1f} s"
            return Culprit(standing.rank, reason) if is_stalled else None
        known = [standings[peer] for peer in standing.waits_for if peer in standings]
        if not known:
            return None
        # Of several, one that does not wait itself: the others have come and wait as this rank does.
        following = min(known, key=lambda peer: (bool(peer.waits_for), -peer.idle_s))
        if following.rank in chain:
            circle = " and ".join(f"rank {peer}" for peer in chain[chain.index(following.rank) :])
            return Culprit(following.rank, f"waits in a circle: {circle} wait for each other")
        chain.append(following.rank)


def format_standings(standings: Mapping[int, Standing], silent_s: Mapping[int, float], culprit: int) -> str:
    """List every rank's standing, one line each, with an arrow at the culprit's.

    Example:
        >>> print(format_standings({0: Standing(0, "a", 7, "0-1", 3, "RECV 1 0:8 <1", waits_for=(1,))}, {}, 1))
          rank 0 on a (pid 7), blocks 0-1, step 3: RECV 1 0:8 <1, waits for rank 1, since 0.0 s
    """
    lines = []
    for rank, standing in sorted(standings.items()):
        arrow = "->" if rank == culprit else "  "
        waits = f", waits for rank {', '.join(map(str, standing.waits_for))}" if standing.waits_for else ""
        silence = f", last heard {silent_s[rank]:.1f} s ago" if silent_s.get(rank, 0.0) > 2.0 else ""
        blocks = f"blocks {standing.blocks}" if standing.blocks else "no blocks"
        what = "done" if standing.is_done else standing.place
        lines.append(
            f"{arrow}rank {rank} on {standing.host} (pid {standing.pid}), {blocks}, step {standing.step}: "
            f"{what}{waits}, since {standing.idle_s:.1f} s{silence}"
        )
    return "\n".join(lines)
