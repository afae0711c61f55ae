"""Try all faults and many kills; write what was seen into docs/failure.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from faults.matrix import FAULTS, format_matrix, try_fault
from faults.rounds import format_rounds, try_rounds

PAGE = Path(__file__).parents[1] / "docs" / "failure.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"


def main() -> int:
    """Run, write the page unless told not to, and tell by the exit status whether all was as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3, help="how often each fault is tried")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of killing and resuming")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="numbers of ranks of the faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rounds")
    parser.add_argument("--print-only", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    trials = [
        try_fault(fault, num_ranks) for fault in FAULTS for num_ranks in options.ranks for _ in range(options.times)
    ]
    failed = try_rounds(options.rounds, options.seed)
    text = f"{format_matrix(trials)}\n{format_rounds(options.rounds, failed)}\n"
    sys.stdout.write(text)
    if not options.print_only:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return int(bool(failed) or not all(trial.is_as_promised for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
