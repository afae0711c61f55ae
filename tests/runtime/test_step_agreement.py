"""Requests that reach ranks at different steps, and the one step after which all follow."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.runtime.step_agreement import END, SAVE, Due, StepAgreement


def tell(ranks: list[StepAgreement], *, has_failed: bool = False, is_over: bool = False) -> None:
    bids = {index: rank.bids() for index, rank in enumerate(ranks)}
    for index, rank in enumerate(ranks):
        others = {peer: bid for peer, bid in bids.items() if peer != index}
        rank.hear(others, is_over=is_over, has_failed=has_failed)


@given(
    num_done=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    kinds=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([END, SAVE])), min_size=1, max_size=3),
)
def test_all_ranks_follow_after_the_same_step_which_none_has_passed(
    num_done: list[int], kinds: list[tuple[int, str]]
) -> None:
    ranks = [StepAgreement() for _ in num_done]
    for rank, num in zip(ranks, num_done, strict=True):
        assert [rank.step_done() for _ in range(num)] == [[]] * num
    for index, kind in kinds:
        ranks[index % len(ranks)].request(kind)
    for _ in range(3):
        tell(ranks)
    asked = {kind for _, kind in kinds}
    followed: list[dict[str, int]] = [{} for _ in ranks]
    for index, rank in enumerate(ranks):
        for step in range(num_done[index] + 1, 9):
            for due in rank.step_done():
                assert due.is_agreed
                followed[index][due.kind] = step
    assert followed == [dict.fromkeys(sorted(asked), max(num_done) + 1)] * len(ranks)
    assert not any(rank.is_open(kind) for rank in ranks for kind in asked)


def test_a_rank_that_is_asked_again_follows_again() -> None:
    ranks = [StepAgreement(), StepAgreement()]
    for step in (1, 2):
        ranks[0].request(SAVE)
        for _ in range(2):
            tell(ranks)
        assert [rank.step_done() for rank in ranks] == [[Due(SAVE, is_agreed=True)]] * 2, step
        assert [rank.step_done() for rank in ranks] == [[]] * 2


def test_asking_twice_before_it_is_followed_is_asking_once() -> None:
    rank = StepAgreement()
    rank.hear({}, is_over=False, has_failed=False)
    for _ in range(2):
        rank.request(SAVE)
        assert rank.bids() == {SAVE: [1]}
    assert rank.step_done() == [Due(SAVE, is_agreed=True)]
    assert rank.step_done() == []


def test_a_step_in_the_middle_of_an_accumulation_is_passed_on_all_ranks() -> None:
    rank = StepAgreement()
    rank.hear({}, is_over=False, has_failed=False)
    rank.request(END)
    assert rank.bids() == {END: [1]}
    assert rank.step_done(can_stop=False) == []
    assert rank.step_done() == [Due(END, is_agreed=True)]


def test_a_rank_waits_for_the_bids_of_others() -> None:
    ranks = [StepAgreement(), StepAgreement()]
    ranks[1].step_done()
    ranks[0].request(END)
    ranks[0].bids()
    found: list[list[Due]] = []
    waiting = threading.Thread(target=lambda: found.append(ranks[0].step_done()))
    waiting.start()
    for _ in range(2):
        tell(ranks)
    waiting.join(timeout=10)
    assert found == [[]], "the other rank has begun its second step"
    assert ranks[0].step_done() == ranks[1].step_done() == [Due(END, is_agreed=True)]


@pytest.mark.parametrize("reason", ["a rank has failed", "no word comes"])
def test_where_no_agreement_can_come_each_rank_is_told_so(reason: str) -> None:
    rank = StepAgreement()
    rank.request(END)
    rank.bids()
    if reason == "a rank has failed":
        rank.hear({1: {}}, is_over=False, has_failed=True)
    assert rank.step_done(patience_s=0.01) == [Due(END, is_agreed=False)]


def test_nobody_stops_when_a_rank_has_done_its_part() -> None:
    rank = StepAgreement()
    rank.request(END)
    rank.bids()
    rank.hear({1: {}}, is_over=True, has_failed=False)
    assert rank.step_done() == []
