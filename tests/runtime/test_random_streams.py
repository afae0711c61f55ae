from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.runtime.random_streams import borrowed_random_states, random_states, random_stream, stream_key

CPU = torch.device("cpu")


def draw() -> tuple[float, float]:
    return torch.rand(()).item(), random.random()


def draw_all() -> tuple[float, float, float]:
    return *draw(), float(np.random.rand())


class TestKeys:
    @given(st.integers(), st.lists(st.integers(), max_size=4))
    def test_key_is_a_seed_that_depends_on_nothing_but_its_numbers(self, seed: int, coordinates: list[int]) -> None:
        assert stream_key(seed, *coordinates) == stream_key(seed, *coordinates)
        assert 0 <= stream_key(seed, *coordinates) < 2**63

    @pytest.mark.parametrize(
        ("first", "second"), [((1, 2, 3), (1, 3, 2)), ((1, 23), (12, 3)), ((1,), (1, 0)), ((1, -1), (1, 1))]
    )
    def test_other_numbers_name_another_stream(self, first: tuple[int, ...], second: tuple[int, ...]) -> None:
        assert stream_key(*first) != stream_key(*second)

    def test_key_stays_what_it_was_when_checkpoints_were_written(self) -> None:
        assert stream_key(42, 3, 7, 1, 0) == 1056604135717659896


class TestStream:
    def test_equal_keys_draw_equal_numbers_wherever_they_are_opened(self) -> None:
        with random_stream(5, CPU):
            first = draw()
        draw()
        with random_stream(5, CPU):
            assert draw() == first
        with random_stream(6, CPU):
            assert draw() != first

    def test_outside_the_generators_go_on_as_if_nothing_was_drawn(self) -> None:
        before = random_states()
        expected = draw_all()
        with borrowed_random_states(before):
            with random_stream(5, CPU):
                draw()
            assert draw_all() == expected

    def test_without_python_only_torch_is_covered(self) -> None:
        state = random.getstate()
        with random_stream(5, CPU, with_python=False):
            first, theirs = torch.rand(()), random.random()
        random.setstate(state)
        assert random.random() == theirs
        with random_stream(5, CPU):
            assert torch.equal(torch.rand(()), first)

    def test_streams_nest(self) -> None:
        with random_stream(5, CPU):
            expected = [draw(), draw()]
        with random_stream(5, CPU):
            seen = [draw()]
            with random_stream(6, CPU):
                draw()
            seen.append(draw())
        assert seen == expected

    @pytest.mark.parametrize(
        "context", [lambda: random_stream(5, CPU), lambda: borrowed_random_states(random_states())]
    )
    def test_error_inside_leaves_the_outside_as_it_was(
        self, context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        expected = torch.get_rng_state(), random.getstate()

        def fail() -> None:
            with context():
                draw()
                raise KeyError("inside")

        with pytest.raises(KeyError, match="inside"):
            fail()
        assert torch.equal(torch.get_rng_state(), expected[0])
        assert random.getstate() == expected[1]


class TestBorrowing:
    def test_borrowed_states_draw_what_their_owner_draws(self) -> None:
        states = random_states()
        expected = draw_all()
        draw_all()
        with borrowed_random_states(states):
            assert draw_all() == expected

    def test_own_states_go_on_after_borrowing(self) -> None:
        foreign = random_states()
        draw_all()
        own = random_states()
        expected = draw_all()
        with borrowed_random_states(own):
            with borrowed_random_states(foreign):
                draw_all()
            assert draw_all() == expected

    def test_states_go_on_from_where_they_were_left(self) -> None:
        states = random_states()
        expected = [draw_all(), draw_all()]
        seen = []
        for _ in range(2):
            with borrowed_random_states(states):
                seen.append(draw_all())
                states = random_states()
        assert seen == expected
