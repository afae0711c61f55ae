"""The pictures of the documentation, drawn from compiled programs, simulated runs and the timeline of a real one.

``conf.py`` calls :func:`draw_all` before pages are read; every picture is drawn once for light and once for dark pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import Action, Kind
from lightning_pipebd.planning.simulate import TimelineSpan, simulate

__all__ = ["PICTURES", "THEMES", "draw_all"]

NUM_ROWS = 64
EVEN = ((1.0, 1.0, 1.0, 1.0), (3.0, 3.0, 3.0, 3.0))
WORKED = ((1.0, 2.0, 4.0, 1.0), (3.0, 3.0, 6.0, 3.0))
"""Milliseconds of the teacher's and the student's jobs of the example that `planning.md` works by hand."""
LOST_MS = 0.25
"""What a job of half the rows takes beyond half of the time."""
MEASURED = Path(__file__).parent / "measured" / "half_cut.json"
"""What `Timeline` wrote of the half cut of that example; `benchmarks/sleeping_blocks/timeline.py` runs it."""
SLOWER = 10
"""How many times as long as in the example blocks took there."""


class Theme(NamedTuple):
    """Colours that can be read on a page; those of jobs come in pairs, for batches that follow each other."""

    text: str
    grid: str
    teacher: tuple[str, str]
    student: tuple[str, str]
    on_teacher: tuple[str, str]
    on_student: tuple[str, str]


THEMES = {
    "light": Theme(
        text="#1b1f24",
        grid="#d5d9de",
        teacher=("#2f6fb3", "#9dc0e4"),
        student=("#e08a1e", "#f2bf7d"),
        on_teacher=("#ffffff", "#1b1f24"),
        on_student=("#1b1f24", "#1b1f24"),
    ),
    "dark": Theme(
        text="#d7dbe0",
        grid="#454b54",
        teacher=("#3f7fc4", "#264d78"),
        student=("#e39a3b", "#80551c"),
        on_teacher=("#ffffff", "#ffffff"),
        on_student=("#14171a", "#ffffff"),
    ),
}


class Bar(NamedTuple):
    """A job on a rank's line."""

    rank: int
    start_ms: float
    stop_ms: float
    is_teacher: bool
    block: int
    batch: int


def table(teach_ms: Sequence[float], learn_ms: Sequence[float], lost_ms: float = 0.0) -> CostTable:
    """Give costs of jobs that take these times for a whole batch, and a little more than half for half of it."""

    def curve(ms: float) -> Curve:
        return Curve([(NUM_ROWS // 2, ms / 2 + lost_ms), (NUM_ROWS, ms)])

    times = tuple(
        BlockTimes(teach_ms=curve(teach), learn_ms=curve(learn))
        for teach, learn in zip(teach_ms, learn_ms, strict=True)
    )
    return CostTable(
        blocks=tuple(BlockSizes(name=f"block {block}") for block in range(len(times))),
        devices=(DeviceTimes(device_class="default", blocks=times),),
        boundary_bytes_per_row=(1,) * (len(times) + 1),
    )


def run(plan: Plan, costs: CostTable, num_steps: int = 12) -> tuple[list[Bar], float]:
    """Simulate a plan; give all jobs of all batches, and the time of a step."""
    found = simulate(plan, costs, Cluster.uniform(plan.num_ranks), num_rows=NUM_ROWS, num_steps=num_steps)
    return [_bar(span) for span in found.timeline if span.action.kind in (Kind.TEACH, Kind.LEARN)], found.step_time_ms


def _bar(span: TimelineSpan) -> Bar:
    is_teacher = span.action.kind is Kind.TEACH
    return Bar(span.rank, span.start_ms, span.stop_ms, is_teacher, span.action.index, span.step)


def show(axes: Axes, bars: Iterable[Bar], num_ranks: int, until_ms: float, title: str, theme: Theme) -> None:
    """Draw one line per rank."""
    shown = [bar for bar in bars if bar.start_ms < until_ms]
    widths = [min(bar.stop_ms, until_ms) - bar.start_ms for bar in shown]
    shades = [(theme.teacher if bar.is_teacher else theme.student)[bar.batch % 2] for bar in shown]
    ranks, starts = [bar.rank for bar in shown], [bar.start_ms for bar in shown]
    axes.barh(ranks, widths, left=starts, height=0.78, color=shades, edgecolor=theme.grid, linewidth=0.8)
    for bar, width in zip(shown, widths, strict=True):
        if width >= until_ms / 44:
            colour = (theme.on_teacher if bar.is_teacher else theme.on_student)[bar.batch % 2]
            name = f"{'T' if bar.is_teacher else 'S'}{bar.block}"
            axes.text(bar.start_ms + width / 2, bar.rank, name, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xlim(0, until_ms)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.set_title(title, loc="left", color=theme.text, fontsize=11)
    axes.tick_params(colors=theme.text, length=0, labelsize=9)
    axes.grid(axis="x", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def panels(heights: Sequence[int], theme: Theme) -> tuple[Figure, list[Axes]]:
    """Make one drawing area under the other, each as high as its ranks need, on a common clock."""
    figure = Figure(figsize=(9, 0.42 * sum(heights) + 0.55 * len(heights) + 0.75), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    areas = [figure.add_subplot(grid[row, 0]) for row in range(len(heights))]
    for area in areas[:-1]:
        area.tick_params(labelbottom=False)
    areas[-1].set_xlabel("ms", color=theme.text, fontsize=9)
    handles = [
        Patch(color=theme.teacher[0], label="teacher block"),
        Patch(color=theme.student[0], label="student block"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, labelcolor=theme.text, fontsize=9)
    return figure, areas


def relay(theme: Theme) -> Figure:
    """One device and four, the same batches."""
    costs, until = table(*EVEN), 40.0
    figure, areas = panels([1, 4], theme)
    for area, plan, name in zip(areas, (Plan.straight([4]), Plan.straight([1] * 4)), ("one", "four"), strict=True):
        bars, step = run(plan, costs)
        show(area, bars, plan.num_ranks, until, f"{name} device{'s' * (name == 'four')}: {step:g} ms per batch", theme)
    return figure


def redundancy(theme: Theme) -> Figure:
    """Block after block, each with the teacher from its start, and all blocks after one pass of the teacher."""
    costs = table(*EVEN)
    separate: list[Bar] = []
    for block in range(4):
        # A program for the first blocks alone; of its student jobs only the last is wanted.
        bars, _ = run(Plan.straight([block + 1]), table(EVEN[0][: block + 1], EVEN[1][: block + 1]))
        for bar in bars:
            if bar.batch == 0 and (bar.is_teacher or bar.block == block):
                start = separate[-1].stop_ms if separate else 0.0
                separate.append(bar._replace(start_ms=start, stop_ms=start + bar.stop_ms - bar.start_ms, batch=block))
    until = separate[-1].stop_ms
    together = [bar for bar in run(Plan.straight([4]), costs)[0] if bar.batch == 0]
    figure, areas = panels([1, 1], theme)
    show(areas[0], separate, 1, until, "block after block: the teacher runs ten blocks", theme)
    show(areas[1], together, 1, until, "with every boundary kept for who needs it: four", theme)
    return figure


def decoupling(theme: Theme) -> Figure:
    """A barrier after every batch, and none."""
    costs, plan = table((1.0,) * 3, (3.0,) * 3), Plan.straight([1, 1, 1])
    bars, step = run(plan, costs)
    first = [bar for bar in bars if bar.batch == 0]
    length = max(bar.stop_ms for bar in first)
    waiting = [
        bar._replace(start_ms=bar.start_ms + batch * length, stop_ms=bar.stop_ms + batch * length, batch=batch)
        for batch in range(4)
        for bar in first
    ]
    figure, areas = panels([3, 3], theme)
    show(areas[0], waiting, 3, 4 * length, f"all together: {length:g} ms per batch", theme)
    for batch in range(1, 4):
        areas[0].axvline(batch * length, color=theme.text, linewidth=1.5)
    show(areas[1], bars, 3, 4 * length, f"decoupled: {step:g} ms per batch, once the pipeline is full", theme)
    return figure


def worked(theme: Theme) -> Figure:
    """The plans of the example that is worked by hand."""
    costs, until = table(*WORKED, LOST_MS), 42.0
    plans = {"straight": "0-1|2-3", "half cut": "0-1,T2|S2,3", "joint": "0-3*2"}
    figure, areas = panels([2] * len(plans), theme)
    for area, (name, text) in zip(areas, plans.items(), strict=True):
        bars, step = run(parse_plan(text), costs)
        show(area, bars, 2, until, f"{name}, {text}: {step:g} ms per batch", theme)
    return figure


def measured(theme: Theme) -> Figure:
    """The half cut of that example, predicted and run."""
    real = read_timeline(MEASURED)
    first, last = min(bar.batch for bar in real), max(bar.batch for bar in real)
    times = [tuple(SLOWER * ms for ms in jobs) for jobs in WORKED]
    bars, step = run(parse_plan("0-1,T2|S2,3"), table(times[0], times[1]), num_steps=last + 1)
    start = min(bar.start_ms for bar in bars if bar.batch == first)
    foreseen = [
        bar._replace(start_ms=bar.start_ms - start, stop_ms=bar.stop_ms - start)
        for bar in bars
        if first <= bar.batch <= last
    ]
    until = 42.0 * SLOWER
    figure, areas = panels([2, 2], theme)
    show(areas[0], foreseen, 2, until, f"predicted: {step:g} ms per batch", theme)
    show(areas[1], real, 2, until, f"measured: {pace_ms(real):.0f} ms per batch", theme)
    return figure


def read_timeline(path: Path) -> list[Bar]:
    """Give the jobs of a file that `Timeline` wrote."""
    spans = [event for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if event["ph"] == "X"]
    jobs = [span for span in spans if span["cat"] in (Kind.TEACH.value, Kind.LEARN.value)]
    return [
        Bar(
            rank=span["pid"],
            start_ms=span["ts"] / 1000,
            stop_ms=(span["ts"] + span["dur"]) / 1000,
            is_teacher=span["cat"] == Kind.TEACH.value,
            block=Action.parse(span["name"]).index,
            batch=span["args"]["step"],
        )
        for span in jobs
    ]


def pace_ms(bars: Iterable[Bar]) -> float:
    """Give the time from batch to batch at the end of the last rank."""
    bars = list(bars)
    rank, batches = max(bar.rank for bar in bars), {bar.batch for bar in bars}
    ends = [max(bar.stop_ms for bar in bars if (bar.rank, bar.batch) == (rank, batch)) for batch in sorted(batches)]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


PICTURES: dict[str, Callable[[Theme], Figure]] = {
    "relay": relay,
    "redundancy": redundancy,
    "decoupling": decoupling,
    "worked": worked,
    "measured": measured,
}
"""What pages may show, by name."""


def draw_all(folder: Path) -> None:
    """Draw every picture in every theme into a folder, as `<name>_<theme>.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    # Text as text: it is found by a search and read aloud. A fixed salt and no date: an unchanged picture stays equal.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pipebd", "font.family": "sans-serif"}):
        for name, draw in PICTURES.items():
            for theme_name, theme in THEMES.items():
                path = folder / f"{name}_{theme_name}.svg"
                draw(theme).savefig(path, transparent=True, metadata={"Date": None})
