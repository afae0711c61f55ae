"""Whatever is configured: a run that ends, or an error that says what to change; never a hang."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer

from faults.configurations import check_refusal, try_alone, try_setup, try_together
from lightning_pipebd.plans import resolve_plan
from tests.helpers.ranks import run_processes
from tests.helpers.toy import LinearModule

pytestmark = pytest.mark.spawn


def set_up_and_train(rank: int) -> None:
    try_alone(rank, 20, 0)
    try_setup(rank, 40, 0)


def test_drawn_configurations_train_in_one_process_or_are_refused() -> None:
    run_processes(1, set_up_and_train, timeout=120)


def test_drawn_configurations_train_in_two_processes_or_are_refused() -> None:
    try_together(2, 0)


def caught(function: Any, *args: Any, **kwargs: Any) -> BaseException:
    with pytest.raises(Exception) as found:  # noqa: PT011  # which one is the question
        function(*args, **kwargs)
    return found.value


def test_an_error_of_ours_or_of_lightning_that_says_what_to_do_is_a_refusal() -> None:
    check_refusal(caught(resolve_plan, 7, LinearModule(), 2))
    check_refusal(caught(Trainer, accelerator="cpu", logger=False, fast_dev_run=-1))


def test_a_failed_look_up_is_no_refusal() -> None:
    with pytest.raises(AssertionError, match="TypeError is no refusal that helps"):
        check_refusal(caught(LinearModule().block_parameters, None))
    with pytest.raises(AssertionError, match="ValueError is no refusal that helps"):
        check_refusal(caught(int, "x"))
