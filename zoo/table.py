"""What was seen of all entries, as the tables of docs/models.md."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from benchmarks.shared.tables import markdown_table
from zoo.library import LIBRARIES, find_entry
from zoo.trials import Trial

__all__ = ["format_page"]

_EXACT = "bit for bit"
_FURTHER = {"joint": "joint: up to summation", "compile": f"compiled: {_EXACT}"}
_COLUMNS = ["model", "divided by", "blocks", "teacher as undivided", "two ranks as one", "remarks"]


def format_page(trials: Mapping[str, Trial]) -> str:
    """Give a heading and a table for each library that was tried, and what was not as promised."""
    parts = []
    for library in LIBRARIES:
        mine = {name: trial for name, trial in trials.items() if name.startswith(f"{library}.")}
        if not mine:
            continue
        rows = [_row(name, trial) for name, trial in mine.items()]
        versions = f"{library} {_release(library)}, torch {_release('torch')}"
        num_good = sum(trial.is_as_promised for trial in mine.values())
        parts += [f"### {library}", "", f"{versions}: {num_good} of {len(mine)} as promised.", ""]
        parts += [markdown_table(_COLUMNS, rows), ""]
    parts += [f"{name}: {trial.failure}" for name, trial in trials.items() if trial.failure]
    return "\n".join(parts).rstrip("\n") + "\n"


def _row(name: str, trial: Trial) -> list[str]:
    entry = find_entry(name)
    trained = _EXACT if trial.equal.get("whole") and trial.has_learned else "**no**"
    further = [text if trial.equal.get(mode) else f"{mode}: **no**" for mode, text in _FURTHER.items()]
    wanted = [text for mode, text in zip(_FURTHER, further, strict=True) if mode in entry.further]
    refused = [f"refused at {_list_paths(entry.first_try)}"] if entry.first_try else []
    if not trial.is_refused_well:
        refused = ["**refusal not as promised**"]
    return [
        name.partition(".")[2],
        entry.way,
        str(trial.num_blocks),
        _EXACT if trial.is_as_undivided else "**no**",
        "; ".join([trained, *wanted]) if trial.is_trained else "not tried",
        "; ".join([*([entry.remark] if entry.remark else []), *refused]),
    ]


def _list_paths(paths: tuple[str, ...]) -> str:
    return ", ".join(f"`{path}`" if path else "the model's end" for path in paths)


def _release(package: str) -> str:
    return version(package).partition("+")[0]
