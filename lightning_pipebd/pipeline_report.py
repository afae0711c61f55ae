"""The run of a whole student on one page: the plan, prediction beside truth, the ranks' time, the relay, the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_pipebd.planning.pipeline_explain import describe_exactness
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.quantities import format_bytes
from lightning_pipebd.plots import DrawnSpan, draw_losses, draw_timelines
from lightning_pipebd.report_page import Section, write_page
from lightning_pipebd.run_report import describe_prediction
from lightning_pipebd.trace_summary import kinds_of

__all__ = ["PipelineReport"]


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """The run of a whole student in numbers and pictures.

    Args:
        plan: Who computed what.
        teacher_names: One for every teacher block.
        student_names: One for every student block.
        num_rows: Rows of a batch.
        num_micro_batches: Parts of a batch.
        schedule: Order of the work.
        explanation: The plan in words, where nothing was foreseen.
        coupled_blocks: Student blocks whose result depends on how a batch is cut.
        summary: What the recorded steps took; see :func:`~lightning_pipebd.trace_summary.summarise`.
        timelines: Titles and spans, the predicted timeline first.
        losses: For each term of the loss steps and values.
        outlook: What was foreseen; ``None`` if nothing was measured before.
    """

    plan: PipelinePlan
    teacher_names: Sequence[str]
    student_names: Sequence[str]
    num_rows: int
    num_micro_batches: int
    schedule: str
    explanation: str
    coupled_blocks: Sequence[int]
    summary: Mapping[str, Any]
    timelines: Mapping[str, Sequence[DrawnSpan]]
    losses: Mapping[str, Sequence[tuple[int, float]]]
    outlook: PipelineOutlook | None = None

    def write(self, path: str | Path) -> None:
        """Write the page: Markdown with its pictures beside it, or one HTML file with its pictures in it.

        Args:
            path: File to write; its ending, ``.md`` or ``.html``, chooses.

        Raises:
            ImportError: matplotlib is not installed.
        """
        pictures = {
            "timeline.svg": partial(draw_timelines, timelines=self.timelines),
            "losses.svg": partial(draw_losses, curves=self.losses),
        }
        write_page(path, self.title, self.sections(), pictures)

    @property
    def title(self) -> str:
        """Name of the page."""
        return f"Run of a whole student on {self.plan.num_ranks} ranks"

    def sections(self) -> list[Section]:
        """Give the page part by part."""
        both = "Predicted above measured, on one scale; hatched is waiting, a dash marks the next batch."
        return [
            Section("At a glance", table=[["", ""], *map(list, self._glance())]),
            Section("Timeline", both if len(self.timelines) > 1 else "Measured.", picture="timeline.svg"),
            Section("Ranks", "Milliseconds per step; RECV, SEND and REDUCE are no work.", self._rank_table()),
            Section("Blocks", "Milliseconds per step, of all micro-batches together.", self._block_table()),
            Section("Relay", "What the ranks sent in a step.", self._relay_table()),
            Section("Losses", "The terms of the loss, by training step.", picture="losses.svg"),
            Section("Plan", verbatim=self.explanation if self.outlook is None else str(self.outlook)),
        ]

    def _glance(self) -> list[tuple[str, str]]:
        measured, slowest = self.summary["step_time_ms"], self.summary["slowest_block"]
        number = self.num_micro_batches
        cut = "whole batches" if number == 1 else f"{number} micro-batches"
        last = (f"{name} {curve[-1][1]:.4g}" for name, curve in self.losses.items() if curve)
        return [
            ("plan", f"{self.plan} ({cut}, {self.schedule})"),
            ("exactness", describe_exactness(number, self.coupled_blocks, replicas=self.plan.replicas)),
            ("rows of a batch", str(self.num_rows)),
            ("predicted step", describe_prediction(self.outlook, measured)),
            ("measured step", f"{measured:.4g} ms, over {self.summary['steps']} steps"),
            ("bubble share", f"{self.summary['bubble_fraction']:.0%} of the ranks' time is not work"),
            ("slowest block", "unknown" if slowest is None else self._name(*slowest.split())),
            ("relay traffic", self._traffic()),
            ("last loss", ", ".join(last) or "unknown"),
        ]

    def _traffic(self) -> str:
        relay = self.summary["relay"]
        pairs = len({(entry["from"], entry["to"]) for entry in relay})
        total = format_bytes(round(sum(entry["bytes"] for entry in relay)))
        return f"{total} per step over {pairs} connection{'s' if pairs > 1 else ''}" if pairs else "none"

    def _rank_table(self) -> list[list[str]]:
        kinds = kinds_of(self.summary)
        table = [["rank", *kinds, "at work", "predicted"]]
        for found in self.summary["ranks"]:
            rank, foreseen = found["rank"], "-"
            if self.outlook is not None and self.outlook.step_time_ms:
                foreseen = f"{self.outlook.judgement.busy_ms[rank] / self.outlook.step_time_ms:.0%}"
            times = [f"{found[kind.lower()]:.2f}" for kind in kinds]
            table.append([str(rank), *times, f"{found['utilisation']:.0%}", foreseen])
        return table

    def _block_table(self) -> list[list[str]]:
        found = {block["block"]: block for block in self.summary["blocks"]}
        costs = None if self.outlook is None else self.outlook.costs
        table = [["block", "rank", "forward", "predicted", "backward", "predicted"]]
        for block, rank in enumerate(self.plan.teacher):
            foreseen = "-" if costs is None else f"{costs.teach_ms[block]:.2f}"
            took = f"{found.get(f'teacher {block}', {}).get('teach', 0.0):.2f}"
            table.append([self._name("teacher", block), self._ranks(rank), took, foreseen, "-", "-"])
        for block, rank in enumerate(self.plan.student):
            own = found.get(f"student {block}", {})
            cells = []
            for kind, times in (
                ("forward", costs and costs.forward_ms),
                ("backward", costs and costs.backward_ms),
            ):
                cells += [f"{own.get(kind, 0.0):.2f}", f"{times[block]:.2f}" if times else "-"]
            table.append([self._name("student", block), self._ranks(rank), *cells])
        return table

    def _relay_table(self) -> list[list[str]]:
        table = [["from", "to", "what", "rows", "bytes per step"]]
        for entry in self.summary["relay"]:
            rows, size = f"{entry['rows']:.4g}", format_bytes(round(entry["bytes"]))
            table.append([str(entry["from"]), str(entry["to"]), entry["what"], rows, size])
        return table

    def _ranks(self, rank: int) -> str:
        return ", ".join(map(str, self.plan.sharing_ranks(rank)))

    def _name(self, model: str, block: int | str) -> str:
        name = (self.teacher_names if model == "teacher" else self.student_names)[int(block)]
        return f"{model} {block} ({name})" if name else f"{model} {block}"
