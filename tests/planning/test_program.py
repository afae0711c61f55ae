from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program
from tests.helpers.plans import batches


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(Kind.LOAD, rows=Rows(0, 64)), "LOAD rows=0:64"),
        (Action(Kind.RECV, 2, Rows(0, 64), peer=0), "RECV boundary=2 rows=0:64 from=0"),
        (Action(Kind.RECV, TARGETS, Rows(8, 16), peer=3), "RECV boundary=targets rows=8:16 from=3"),
        (Action(Kind.TEACH, 1, Rows(0, 64)), "TEACH block=1 rows=0:64"),
        (Action(Kind.SEND, 0, Rows(0, 64), peer=1), "SEND boundary=0 rows=0:64 to=1"),
        (Action(Kind.SEND, TARGETS, Rows(0, 64), peer=1), "SEND boundary=targets rows=0:64 to=1"),
        (Action(Kind.LEARN, 1, Rows(32, 64)), "LEARN block=1 rows=32:64"),
        (Action(Kind.REDUCE, 1, ranks=(0, 1)), "REDUCE block=1 ranks=0,1"),
        (Action(Kind.UPDATE, 1), "UPDATE block=1"),
    ],
)
def test_action_prints_in_one_line_and_parses_back(action: Action, text: str) -> None:
    assert str(action) == text
    assert Action.parse(text) == action


@given(batch=batches(), update=st.booleans())
def test_every_program_and_action_comes_back_from_its_text(
    batch: tuple[Plan, int, frozenset[int]], update: bool
) -> None:
    plan, num_rows, target_blocks = batch
    for program in compile_programs(plan, num_rows, target_blocks=target_blocks, update=update):
        assert Program.parse(str(program)) == program
        assert tuple(Action.parse(str(action)) for action in program.actions) == program.actions


def test_program_parses_from_an_indented_block_with_empty_lines() -> None:
    text = """
        PROGRAM rank=1 rows=8

        RECV boundary=1 rows=0:8 from=0
        UPDATE block=1
    """
    actions = (Action(Kind.RECV, 1, Rows(0, 8), peer=0), Action(Kind.UPDATE, 1))
    assert Program.parse(text) == Program(1, 8, actions)


@pytest.mark.parametrize("text", ["", "WAIT rows=0:4", "load rows=0:4"])
def test_unknown_kind_of_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`Action` must start with one of LOAD, RECV, TEACH, SEND, LEARN"):
        Action.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "RECV boundary=2 rows=0:64",
        "RECV boundary=2 rows=0:64 to=0",
        "RECV rows=0:64 boundary=2 from=0",
        "RECV boundary=2 boundary=2 rows=0:64 from=0",
        "RECV boundary=two rows=0:64 from=0",
        "RECV boundary=2 rows=64 from=0",
        "RECV boundary=2 rows=0:64 from",
    ],
)
def test_action_with_wrong_words_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match="form 'RECV boundary=<boundary> rows=<start>:<stop> from=<rank>', but is"):
        Action.parse(text)


@pytest.mark.parametrize(
    "text", ["", "LOAD rows=0:4", "PROGRAM 0 8", "PROGRAM rank=0", "PROGRAM rank=a rows=8", "PROGRAM rows=8 rank=0"]
)
def test_program_without_its_header_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`Program` must start with 'PROGRAM rank=<rank> rows=<rows>'"):
        Program.parse(text)
