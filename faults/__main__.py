"""Try all faults and many kills; write what was seen into docs/failure.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from faults.configurations import try_alone, try_setup, try_together
from faults.elastic import ELASTIC, format_restarts, try_restart
from faults.matrix import FAULTS, format_matrix, try_fault
from faults.rounds import format_rounds, try_rounds
from tests.helpers.ranks import run_processes

PAGE = Path(__file__).parents[1] / "docs" / "failure.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"


def main() -> int:
    """Run, write the page unless told not to, and tell by the exit status whether all was as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3, help="how often each fault is tried")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of killing and resuming")
    parser.add_argument("--configurations", type=int, default=500, help="configurations drawn at random")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="numbers of ranks of the faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rounds")
    parser.add_argument("--print-only", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    trials = [
        trial
        for fault in FAULTS
        for num_ranks in options.ranks
        for _ in range(options.times)
        if (trial := try_fault(fault, num_ranks)) is not None
    ]
    restarts = [restart for name in ELASTIC if (restart := try_restart(name)) is not None]
    fuzzed = _fuzz(options.configurations, options.seed)
    failed = try_rounds(options.rounds, options.seed)
    parts = [format_matrix(trials), format_restarts(restarts), fuzzed, "", format_rounds(options.rounds, failed)]
    text = "\n".join(parts) + "\n"
    sys.stdout.write(text)
    if not options.print_only:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    is_restarted = all(restart.is_complete and restart.is_equal for restart in restarts)
    return int(bool(failed) or not is_restarted or not all(trial.is_as_promised for trial in trials))


def _fuzz(num_examples: int, seed: int) -> str:
    """Draw configurations; gives a sentence, and raises the first that neither runs nor is refused well."""
    num_together = max(1, num_examples // 20)
    run_processes(1, try_alone, num_examples, seed, timeout=2.0 * num_examples + 60)
    run_processes(1, try_setup, num_examples, seed, timeout=2.0 * num_examples + 60)
    try_together(num_together, seed)
    return (
        f"Of {num_examples} configurations drawn at random for one process, {num_examples} for the set-up of several "
        f"and {num_together} for two, each ran to its end or was refused by an error that says what to change."
    )


if __name__ == "__main__":
    sys.exit(main())
