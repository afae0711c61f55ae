"""The run of a whole student on one page: the plan, prediction beside truth, the ranks' time, the relay, the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_pipebd.planning.pipeline_explain import describe_exactness
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.quantities import format_bytes
from lightning_pipebd.plots import DrawnSpan
from lightning_pipebd.report_page import Section
from lightning_pipebd.report_sections import (
    UNKNOWN,
    Link,
    losses_section,
    ranks_section,
    relay_section,
    step_time_rows,
    timeline_section,
    write_report,
)

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
        write_report(path, self.title, self.sections(), timelines=self.timelines, curves=self.losses)

    @property
    def title(self) -> str:
        """Name of the page."""
        return f"Run of a whole student on {self.plan.num_ranks} ranks"

    def sections(self) -> list[Section]:
        """Give the page part by part."""
        return [
            Section("At a glance", table=[["", ""], *map(list, self._glance())]),
            timeline_section(self.timelines, "hatched is waiting, a dash marks the next batch"),
            ranks_section(self.summary, self.outlook),
            Section("Blocks", "Milliseconds per step, of all micro-batches together.", self._block_table()),
            relay_section("What the ranks sent in a step.", self._links()),
            losses_section("The terms of the loss, by training step."),
            Section("Plan", verbatim=self.explanation if self.outlook is None else str(self.outlook)),
        ]

    def _glance(self) -> list[tuple[str, str]]:
        number, slowest = self.num_micro_batches, self.summary["slowest_block"]
        cut = "whole batches" if number == 1 else f"{number} micro-batches"
        last = (f"{name} {curve[-1][1]:.4g}" for name, curve in self.losses.items() if curve)
        return [
            ("plan", f"{self.plan} ({cut}, {self.schedule})"),
            ("exactness", describe_exactness(number, self.coupled_blocks, replicas=self.plan.replicas)),
            *step_time_rows(self.num_rows, self.summary, self.outlook),
            ("slowest block", UNKNOWN if slowest is None else self._name(*slowest.split())),
            ("relay traffic", self._traffic()),
            ("last loss", ", ".join(last) or UNKNOWN),
        ]

    def _traffic(self) -> str:
        relay = self._relay()
        pairs = len({(entry["from"], entry["to"]) for entry in relay})
        total = format_bytes(round(sum(entry["bytes"] for entry in relay)))
        return f"{total} per step over {pairs} connection{'s' if pairs > 1 else ''}" if pairs else "none"

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

    def _links(self) -> list[Link]:
        return [
            Link(entry["from"], entry["to"], entry["what"], f"{entry['rows']:.4g}", entry["bytes"])
            for entry in self._relay()
        ]

    def _relay(self) -> list[dict[str, Any]]:
        """Give what the ranks sent; nothing where the run was too short for a step to be recorded."""
        sent: list[dict[str, Any]] = self.summary.get("relay", [])
        return sent

    def _ranks(self, rank: int) -> str:
        return ", ".join(map(str, self.plan.sharing_ranks(rank)))

    def _name(self, model: str, block: int | str) -> str:
        name = (self.teacher_names if model == "teacher" else self.student_names)[int(block)]
        return f"{model} {block} ({name})" if name else f"{model} {block}"
