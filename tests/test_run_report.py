"""The report: what it says is what was recorded and what the plan makes travel."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from lightning_pipebd import Timeline, parse_plan
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.explain import BlockTraits
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.program import Kind
from lightning_pipebd.plots import DrawnSpan, draw_timelines
from lightning_pipebd.report_page import Section, to_html, to_markdown
from lightning_pipebd.run_report import RunReport
from tests.planning.cost_tables import constant_costs

TRAITS = [BlockTraits(name=name, boundary_bytes_per_row=size) for name, size in (("stem", 128), ("a|b", 64), ("fc", 8))]
SUMMARY = {
    "steps": 4,
    "step_time_ms": 10.0,
    "ranks": [
        {"rank": rank, "load": 1.0, "recv": 0.0, "teach": 2.0, "learn": 4.5, "send": 0.5, "reduce": 0.0, "update": 0.5}
        | {"utilisation": 0.8 - 0.4 * rank}
        for rank in (0, 1)
    ],
    "bubble_fraction": 0.4,
    "blocks": [{"block": 0, "teach": 2.0, "learn": 4.0}, {"block": 2, "teach": 1.0, "learn": 1.5}],
    "slowest_block": 0,
}
SPANS = [DrawnSpan(rank, Kind.LEARN, "L0", 0.0, 4.0) for rank in (0, 1)]


def make_report(**changes: Any) -> RunReport:
    arguments: dict[str, Any] = {
        "plan": parse_plan("0|1-2", num_blocks=3),
        "traits": TRAITS,
        "num_rows": 16,
        "summary": SUMMARY,
        "timelines": {"measured": SPANS},
        "losses": {0: [(0, 1.0), (1, 0.5)], 2: [(0, 2.0), (1, 0.125)]},
    }
    return RunReport(**(arguments | changes))


def foreseen() -> Outlook:
    costs = constant_costs([(1, 2), (1, 1), (1, 1)])
    plan, measurement = parse_plan("0|1-2", num_blocks=3), Measurement(costs=costs, num_rows=16, traits=tuple(TRAITS))
    return Outlook(plan=plan, measurement=measurement, cluster=Cluster.uniform(2))


def table_of(report: RunReport, title: str) -> list[list[str]]:
    (found,) = [section.table for section in report.sections() if section.title == title]
    return [list(row) for row in found]


def test_page_begins_with_what_one_asks_first() -> None:
    found = {row[0]: row[1] for row in table_of(make_report(), "At a glance") if row[0]}
    assert found == {
        "plan": "0|1-2",
        "exactness": "bitwise",
        "rows of a batch": "16",
        "predicted step": "none: the plan was given, and nothing was measured",
        "measured step": "10 ms, over 4 steps",
        "bubble share": "40% of the ranks' time is not work",
        "slowest block": "0 (stem)",
        "relay traffic": "2 KiB per step over 1 connection",
    }


def test_prediction_stands_beside_the_measurement_where_there_is_one() -> None:
    outlook = foreseen()
    report = make_report(outlook=outlook)
    glance = dict(map(tuple, table_of(report, "At a glance")))
    off = 10 / outlook.step_time_ms - 1
    assert glance["predicted step"] == f"{outlook.step_time_ms:.4g} ms, the measured one is {off:+.0%} off"
    assert table_of(report, "Blocks")[1:] == [
        ["0 (stem)", "0", "2.00", "1.00", "4.00", "2.00", "0.5"],
        ["1 (a|b)", "1", "0.00", "1.00", "0.00", "1.00", "-"],
        ["2 (fc)", "1", "1.00", "1.00", "1.50", "1.00", "0.125"],
    ]
    assert [row[-2] for row in table_of(report, "Ranks")[1:]] == ["80%", "40%"]
    busy = [f"{busy_ms / outlook.step_time_ms:.0%}" for busy_ms in outlook.judgement.busy_ms]
    assert [row[-1] for row in table_of(report, "Ranks")[1:]] == busy


def test_relay_names_links_rows_and_bytes() -> None:
    report = make_report(plan=parse_plan("0,T1|S1,2", num_blocks=3), target_blocks=[2])
    assert table_of(report, "Relay")[1:] == [
        ["0", "1", "targets", "16", "unknown"],
        ["0", "1", "boundary 1", "16", "2 KiB"],
        ["0", "1", "boundary 2", "16", "1 KiB"],
    ]
    glance = dict(map(tuple, table_of(report, "At a glance")))
    assert glance["relay traffic"] == "3 KiB per step over 1 connection, and the targets"


class Reader(HTMLParser):
    """Names of elements that are open, and every id."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_one_file_that_needs_no_other_and_has_no_name_twice(tmp_path: Path) -> None:
    make_report().write(tmp_path / "sub" / "run.html")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["run.html"]
    page = (tmp_path / "sub" / "run.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    # What a picture refers to by name is there.
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)) != set()
    assert {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)} <= set(reader.ids)
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', page) == []
    assert page.count("<svg") == 2


def test_markdown_has_its_pictures_beside_it(tmp_path: Path) -> None:
    make_report().write(tmp_path / "run.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.md", "run_losses.svg", "run_timeline.svg"]
    page = (tmp_path / "run.md").read_text()
    assert "![Losses](run_losses.svg)" in page
    assert "| 1 (a\\|b) | 1 |" in page


def test_text_is_escaped_in_html() -> None:
    page = to_html("a < b", [Section("<i>", "&", [["<", ">"]], verbatim="</pre>")], {})
    assert "<title>a &lt; b</title>" in page
    assert "<pre>&lt;/pre&gt;</pre>" in page
    assert to_markdown("a", [Section("b", "c")]) == "# a\n\n## b\n\nc\n"


def test_a_report_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`report` must end in \.html or \.md, but is 'run\.pdf'"):
        Timeline(report="run.pdf")


def test_labels_are_left_out_where_the_common_scale_leaves_no_room(tmp_path: Path) -> None:
    path = tmp_path / "timelines.svg"
    short = [DrawnSpan(0, Kind.TEACH, f"T{step}", step, step + 1) for step in range(8)]
    slow = [DrawnSpan(0, Kind.LEARN, f"L{step}", 100 * step, 100 * step + 90) for step in range(8)]
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw_timelines(path, {"predicted": short, "measured": slow})
    assert re.findall(r">([TL]\d)<", path.read_text()) == [f"L{step}" for step in range(8)]
