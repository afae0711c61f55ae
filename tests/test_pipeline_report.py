"""A whole student's run is recorded, summed up and reported: what is said is what the ranks did and sent."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipebd import PipelinePlan, Timeline
from lightning_pipebd.cli import main
from lightning_pipebd.pipeline_report import PipelineReport
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement, StudentBlockCosts, TeacherBlockCosts
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.plots import DrawnSpan
from lightning_pipebd.trace_summary import kinds_of, summarise
from tests.helpers.scripts import run_forked
from tests.helpers.whole_students import WholeRun, train_whole


def span(rank: int, step: int, name: str, start_ms: float, duration_ms: float, **args: Any) -> dict[str, Any]:
    event = {"ph": "X", "name": name, "cat": name.split()[0], "pid": rank, "args": {"step": step, **args}}
    return {**event, "ts": start_ms * 1000, "dur": duration_ms * 1000}


def recorded() -> dict[str, Any]:
    """Two steps of 10 ms on two ranks, in two micro-batches."""
    spans = []
    for step in (4, 5):
        at = 10 * step
        for half, rows in enumerate(("0:4", "4:8")):
            spans += [
                span(0, step, f"FORWARD block=0 rows={rows}", at + 2 * half, 1),
                span(0, step, f"SEND hidden=1 rows={rows} to=1", at + 2 * half + 1, 0.25, bytes=64),
                span(0, step, f"BACKWARD_INPUT block=0 rows={rows}", at + 4 + 2 * half, 1),
                span(0, step, f"BACKWARD_WEIGHT block=0 rows={rows}", at + 5 + 2 * half, 0.5),
                span(1, step, f"RECV hidden=1 rows={rows} from=0", at, 1.5),
                span(1, step, f"TEACH block=1 rows={rows} batch=next", at + 2, 0.5),
                span(1, step, f"LOSS rows={rows}", at + 3, 0.25),
            ]
        spans += [span(0, step, "UPDATE", at + 8, 0.5), span(1, step, "EMA block=1", at + 8, 0.75)]
    return {"traceEvents": [{"ph": "M"}, *spans], "displayTimeUnit": "ms"}


def test_times_are_summed_up_by_kind_and_by_model() -> None:
    summary = summarise(recorded())
    first, second = summary["ranks"]
    assert (summary["steps"], summary["step_time_ms"]) == (2, pytest.approx(10))
    assert (first["forward"], first["backward"], first["send"], first["update"]) == pytest.approx((2, 3, 0.5, 0.5))
    assert (second["recv"], second["teach"], second["loss"], second["ema"]) == pytest.approx((3, 1, 0.5, 0.75))
    assert [rank["utilisation"] for rank in summary["ranks"]] == pytest.approx([0.55, 0.225])
    assert summary["blocks"] == [
        {"block": "teacher 1", "teach": pytest.approx(1)},
        {"block": "student 0", "forward": pytest.approx(2), "backward": pytest.approx(3)},
    ]
    assert summary["slowest_block"] == "student 0"
    assert summary["relay"] == [{"from": 0, "to": 1, "what": "hidden 1", "rows": 8, "bytes": 128}]
    assert kinds_of(summary) == [
        *("LOAD", "RECV", "TEACH", "FORWARD", "LOSS", "BACKWARD", "SEND", "REDUCE", "UPDATE", "EMA")
    ]


def make_report(**changes: Any) -> PipelineReport:
    arguments: dict[str, Any] = {
        "plan": PipelinePlan.parse("0|1"),
        "teacher_names": ["stem", "head"],
        "student_names": ["a|b", ""],
        "num_rows": 8,
        "num_micro_batches": 2,
        "schedule": "1f1b",
        "explanation": "in words",
        "coupled_blocks": [],
        "summary": summarise(recorded()),
        "timelines": {"measured": [DrawnSpan(0, "FORWARD", "F0", 0.0, 4.0), DrawnSpan(1, "EMA", "E0", 4.0, 5.0)]},
        "losses": {"loss": [(0, 1.0), (1, 0.5)], "soft": [(0, 0.5), (1, 0.25)]},
    }
    return PipelineReport(**(arguments | changes))


def foreseen() -> PipelineOutlook:
    measured = PipelineMeasurement(
        teacher=tuple(TeacherBlockCosts(name=name, teach_ms=Curve([(4, 1), (8, 2)])) for name in "ab"),
        student=tuple(
            StudentBlockCosts(name=name, forward_ms=Curve([(4, 1), (8, 2)]), backward_ms=Curve([(4, 2), (8, 4)]))
            for name in "ab"
        ),
        num_rows=8,
        loss_ms=Curve([(8, 0)]),
    )
    way = PipelineCandidate(PipelinePlan.parse("0|1"), 2, Schedule.ONE_FORWARD_ONE_BACKWARD)
    return PipelineOutlook(candidate=way, measurement=measured, cluster=Cluster.uniform(2))


def table_of(report: PipelineReport, title: str) -> list[list[str]]:
    (found,) = [section.table for section in report.sections() if section.title == title]
    return [list(row) for row in found]


def test_the_page_begins_with_what_one_asks_first() -> None:
    assert {row[0]: row[1] for row in table_of(make_report(), "At a glance") if row[0]} == {
        "plan": "0|1 (2 micro-batches, 1f1b)",
        "exactness": "summation (micro-batches are added up one after another)",
        "rows of a batch": "8",
        "predicted step": "none: the plan was given, and nothing was measured",
        "measured step": "10 ms, over 2 steps",
        "bubble share": "61% of the ranks' time is not work",
        "slowest block": "student 0 (a|b)",
        "relay traffic": "128 B per step over 1 connection",
        "last loss": "loss 0.5, soft 0.25",
    }


def test_predictions_stand_beside_measurements_where_there_are_some() -> None:
    outlook = foreseen()
    report = make_report(outlook=outlook)
    glance = dict(map(tuple, table_of(report, "At a glance")))
    assert glance["predicted step"] == (
        f"{outlook.step_time_ms:.4g} ms, the measured one is {10 / outlook.step_time_ms - 1:+.0%} off"
    )
    assert table_of(report, "Blocks")[1:] == [
        ["teacher 0 (stem)", "0", "0.00", "2.00", "-", "-"],
        ["teacher 1 (head)", "1", "1.00", "2.00", "-", "-"],
        ["student 0 (a|b)", "0", "2.00", "2.00", "3.00", "4.00"],
        ["student 1", "1", "0.00", "2.00", "0.00", "4.00"],
    ]
    busy = [f"{busy_ms / outlook.step_time_ms:.0%}" for busy_ms in outlook.judgement.busy_ms]
    assert [row[-2:] for row in table_of(report, "Ranks")[1:]] == [["55%", busy[0]], ["22%", busy[1]]]
    assert report.sections()[-1].verbatim == str(outlook)


def test_the_relay_is_what_was_sent() -> None:
    assert table_of(make_report(), "Relay")[1:] == [["0", "1", "hidden 1", "8", "128 B"]]


def test_the_page_is_written_with_its_pictures(tmp_path: Path) -> None:
    make_report().write(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert page.count("<svg") == 2
    assert "in words" in page


@pytest.mark.spawn
def test_a_timeline_of_a_momentum_teacher_has_every_kind_of_action(tmp_path: Path) -> None:
    timeline = Timeline(
        tmp_path / "timeline.json", first_step=2, num_steps=3, plot=tmp_path / "t.svg", report=tmp_path / "run.md"
    )
    options = {"num_micro_batches": 2, "split_backward": True}
    trainer = {"max_epochs": 2, "callbacks": [timeline], "gradient_clip_val": 0.5}
    run = WholeRun(module="byol", plan="2-3|0-1 / 0-1|2-3", num_ranks=2, options=options, trainer=trainer)
    train_whole(run, tmp_path / "last.ckpt")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["step"] for event in spans} == {2, 3, 4}
    kinds = {(event["pid"], event["cat"]) for event in spans}
    everywhere = ("RECV", "SEND", "TEACH", "FORWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT", "UPDATE", "EMA")
    assert kinds == {(rank, kind) for rank in (0, 1) for kind in everywhere} | {(0, "LOAD"), (1, "LOSS")}
    for rank in (0, 1):
        own = sorted((event["ts"], event["dur"]) for event in spans if event["pid"] == rank)
        # Nothing overlaps, but for the rounding of the clock on the wall.
        assert all(start + length <= later + 2 for (start, length), (later, _) in pairwise(own))
    sent = [event for event in spans if event["cat"] == "SEND" and not event["name"].startswith("SEND targets")]
    assert all(event["args"]["bytes"] > 0 for event in sent)
    page = (tmp_path / "run.md").read_text()
    assert "| plan | 2-3\\|0-1 / 0-1\\|2-3 (2 micro-batches, 1f1b) |" in page
    assert "weights 0" in page
    assert (tmp_path / "t.svg").read_text().count("rank 1") >= 1


@pytest.mark.spawn
def test_a_run_that_goes_on_is_recorded_from_its_own_first_step(tmp_path: Path) -> None:
    plan = {"module": "distil", "plan": "0-1|2 / 0-1|2-3", "num_ranks": 2, "validate": False}
    first = WholeRun(**plan, trainer={"max_steps": 4})
    train_whole(first, tmp_path / "first.ckpt")
    timeline = Timeline(tmp_path / "timeline.json", first_step=1, num_steps=2, report=tmp_path / "run.md")
    rest = {"max_steps": 9, "max_epochs": None, "callbacks": [timeline]}
    ours, _ = train_whole(WholeRun(**plan, trainer=rest, resume=str(tmp_path / "first.ckpt")), tmp_path / "last.ckpt")
    assert ours["global_step"] == 9
    summary = summarise(json.loads((tmp_path / "timeline.json").read_text()))
    assert (summary["steps"], len(summary["ranks"])) == (2, 2)
    assert (
        "| predicted step | none: the plan was given, and nothing was measured |" in (tmp_path / "run.md").read_text()
    )


@pytest.mark.spawn
def test_the_command_records_a_whole_student_beside_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_pipebd.commands.short_fit.subprocess.run", run_forked)
    monkeypatch.setenv("PIPEBD_CACHE", "")
    content = {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "strategy": "pipebd", "devices": 2, "max_epochs": 50},
        "model": {"class_path": "tests.helpers.whole_students.Distil"},
        "data": {"class_path": "tests.helpers.whole_students.WholeData"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    output, report = tmp_path / "timeline.json", tmp_path / "run.md"
    command = ["trace", "--config", str(tmp_path / "config.yaml"), "--steps", "9", "--output", str(output)]
    assert main([*command, "--report", str(report)]) == 0
    text = capsys.readouterr().out
    assert "over 3 steps; the slowest block is " in text
    assert text.splitlines()[1].split()[3:9] == ["load", "recv", "teach", "forward", "loss", "backward"]
    assert "the measured one is" in report.read_text()
    assert "Predicted above measured" in report.read_text()


def test_a_run_too_short_for_a_recorded_step_has_a_page_that_says_so(tmp_path: Path) -> None:
    report = make_report(summary=summarise({"traceEvents": [{"ph": "M"}]}), timelines={"measured": []}, losses={})
    report.write(tmp_path / "report.md")
    page = (tmp_path / "report.md").read_text()
    assert "| relay traffic | none |" in page
    assert "| slowest block | unknown |" in page
