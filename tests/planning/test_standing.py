"""Who is to blame for a run that does not move, judged from plain numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_pipebd.planning.standing import Standing, find_culprit, format_standings

#: Rank 0 waits for rank 1, which waits for rank 2, which learns.
WAITING = {
    0: Standing(0, waits_for=(1,), idle_s=40.0, bound_s=30.0),
    1: Standing(1, waits_for=(2,), idle_s=41.0, bound_s=30.0),
    2: Standing(2, place="LEARN 2 0:8", idle_s=42.0, bound_s=30.0),
}
HEARD = dict.fromkeys(range(3), 0.1)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_rank_blames_the_end_of_the_chain(rank: int) -> None:
    assert find_culprit(rank, WAITING, HEARD, 30.0)[:2] == (2, "has made no progress for 42.0 s")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nobody_is_blamed_for_the_slowness_of_a_rank_within_its_bound(rank: int) -> None:
    saving = {**WAITING, 2: replace(WAITING[2], place="saving a checkpoint", bound_s=1800.0)}
    assert find_culprit(rank, saving, HEARD, 30.0) is None


def test_a_rank_within_its_own_bound_blames_nobody() -> None:
    assert find_culprit(0, {**WAITING, 0: replace(WAITING[0], idle_s=29.0)}, HEARD, 30.0) is None


@pytest.mark.parametrize("rank", [0, 2])
def test_a_silent_rank_is_blamed_wherever_it_stood(rank: int) -> None:
    moving = {peer: replace(standing, idle_s=0.0) for peer, standing in WAITING.items()}
    assert find_culprit(rank, moving, {**HEARD, 1: 30.5}, 30.0)[:2] == (1, "has not been heard of for 30.5 s")
    assert find_culprit(rank, moving, {**HEARD, 1: 29.5}, 30.0) is None


def test_a_rank_that_has_done_its_part_may_be_silent() -> None:
    done = {**WAITING, 0: replace(WAITING[0], is_done=True)}
    moving = {peer: replace(standing, idle_s=0.0) for peer, standing in done.items()}
    assert find_culprit(1, moving, {**HEARD, 0: 99.0}, 30.0) is None


def test_ranks_that_wait_for_each_other_are_found() -> None:
    circle = {**WAITING, 2: replace(WAITING[2], waits_for=(1,))}
    culprit = find_culprit(0, circle, HEARD, 30.0)
    assert culprit is not None
    assert culprit[:2] == (1, "waits in a circle: rank 1 and rank 2 wait for each other")


def test_of_ranks_that_reduce_together_the_one_that_has_not_come_is_blamed() -> None:
    together = {
        0: Standing(0, waits_for=(1, 2), idle_s=40.0, bound_s=30.0),
        1: Standing(1, waits_for=(0, 2), idle_s=45.0, bound_s=30.0),
        2: Standing(2, idle_s=42.0, bound_s=30.0),
    }
    assert find_culprit(0, together, HEARD, 30.0)[:2] == (2, "has made no progress for 42.0 s")


def test_the_first_failure_comes_before_those_that_follow_from_it() -> None:
    failed = {
        **WAITING,
        1: replace(WAITING[1], failure="has closed its connections", blames=2),
        2: replace(WAITING[2], failure="failed: ValueError: x", blames=2),
    }
    assert find_culprit(0, failed, HEARD, 30.0)[:2] == (2, "failed: ValueError: x")


def test_the_rank_that_another_blames_is_blamed() -> None:
    failed = {**WAITING, 1: replace(WAITING[1], failure="has closed its connections", blames=2)}
    assert find_culprit(0, failed, HEARD, 30.0)[:2] == (2, "has closed its connections")


def test_the_list_points_at_the_culprit_and_says_who_waits_for_whom() -> None:
    standings = {0: replace(WAITING[0], host="a", blocks="0-1", step=4), 2: WAITING[2]}
    first, last = format_standings(standings, {2: 31.0}, 2).splitlines()
    assert first == "  rank 0 on a (pid 0), blocks 0-1, step 4: starting, waits for rank 1, since 40.0 s"
    assert last.startswith("->rank 2")
    assert last.endswith("LEARN 2 0:8, since 42.0 s, last heard 31.0 s ago")
