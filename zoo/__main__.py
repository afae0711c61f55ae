"""Try all models; write what was seen into docs/models.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo.library import LIBRARIES, entries_of
from zoo.table import format_page
from zoo.trials import MODES, try_entries

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"


def main() -> int:
    """Run, write the page if everything is tried, and tell by the exit status whether all was as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="default: all")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="names of models; the page is left as it is")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--print-only", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    missing = [library for library in options.libraries if not entries_of(library)]
    if missing:
        parser.error(f"{', '.join(missing)} is not installed; choose others by --libraries, or install it")
    known = [name for library in options.libraries for name in entries_of(library)]
    names = [name for name in known if not options.only or name.partition(".")[2] in options.only]
    if not names or len(names) < len(options.only or ()):
        short = (name.partition(".")[2] for name in known)
        parser.error(f"--only must name models of {', '.join(options.libraries)}: {', '.join(short)}")
    trials = try_entries(names, options.modes)
    text = format_page(trials)
    sys.stdout.write(text)
    is_everything = names == [name for library in LIBRARIES for name in entries_of(library)]
    if is_everything and tuple(options.modes) == MODES and not options.print_only:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return int(not all(trial.is_as_promised for trial in trials.values()))


if __name__ == "__main__":
    sys.exit(main())
