"""Kill a run at a random step, resume it under a random plan, and compare the student bit by bit."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.ranks import RankError
from tests.helpers.resuming import NUM_EPOCHS, Leg, run_leg
from tests.helpers.training import assert_same_checkpoint

__all__ = ["PLANS", "format_rounds", "try_rounds"]

#: Plans of four blocks that keep every block's rows on one rank, and their ranks.
PLANS = {"0-3": 1, "0-1|2-3": 2, "0,2|1,3": 2, "T0-3|S0-3": 2, "0|1-2|3": 3, "0|1,T2|S2,3": 3, "0|1|2|3": 4}
MODULES = ("linear", "dropout")
LOADERS = ("plain", "workers", "noisy", "generator")
NUM_STEPS = 11 * NUM_EPOCHS
_LONGEST_S = 400.0


def try_rounds(num_rounds: int, seed: int) -> list[str]:
    """Play rounds and give the descriptions of those that did not end with the bits of one process."""
    source = random.Random(seed)
    references: dict[tuple[str, str], Any] = {}
    failed = []
    for index in range(num_rounds):
        # Workers are processes, too: a round with them takes several times as long.
        module, loader = source.choice(MODULES), source.choices(LOADERS, (4, 1, 4, 4))[0]
        if (module, loader) not in references:
            with tempfile.TemporaryDirectory() as directory:
                leg = Leg(plan=None, num_ranks=1, module=module, loader=loader)
                references[module, loader] = run_leg(leg, Path(directory))
        legs = _draw_legs(source, module, loader)
        name = f"round {index}: {module}, {loader}, " + " then ".join(
            f"{leg.plan}" if leg.kill_at is None else f"{leg.plan} killed after step {leg.kill_at}" for leg in legs
        )
        problem = _play(legs, references[module, loader])
        if problem:
            failed.append(f"{name}: {problem}")
            sys.stderr.write(f"FAILED {failed[-1]}\n")
    return failed


def format_rounds(num_rounds: int, failed: list[str]) -> str:
    """Say in a sentence how the rounds went."""
    lines = [f"- {name}" for name in failed]
    return "\n".join(
        [
            f"Of {num_rounds} rounds (random plan, kill after a random step, resume under a random plan), "
            f"{num_rounds - len(failed)} ended with the student of one uninterrupted process, bit for bit.",
            *lines,
        ]
    )


def _draw_legs(source: random.Random, module: str, loader: str) -> list[Leg]:
    legs = []
    every = source.choice([1, 2, 3, 5])
    for _ in range(source.choice([1, 1, 2])):
        plan = source.choice(list(PLANS))
        legs.append(
            Leg(
                plan=plan,
                num_ranks=PLANS[plan],
                module=module,
                loader=loader,
                every=every,
                kill_at=source.randrange(1, NUM_STEPS + 1),
                kill_rank=source.randrange(PLANS[plan]),
                kills_all=source.random() < 0.5,
            )
        )
    plan = source.choice(list(PLANS))
    return [*legs, Leg(plan=plan, num_ranks=PLANS[plan], module=module, loader=loader, every=every)]


def _play(legs: list[Leg], reference: Any) -> str:
    """Play a round; say what went wrong, nothing if all went well."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            states = None
            for leg in legs:
                # On a busy machine nothing is quick; what hangs, hangs longer.
                states = run_leg(leg, Path(directory), timeout=_LONGEST_S)
        assert_same_checkpoint(reference, states)
    except (AssertionError, RankError, TimeoutError) as error:
        return str(error).splitlines()[0]
    return ""
