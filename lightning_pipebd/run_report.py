"""A run on one page: the plan, prediction beside truth, the ranks' time, the relay, the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_pipebd.planning.explain import BlockTraits, exactness_of, exactness_reasons, explain_plan
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.program import TARGETS
from lightning_pipebd.planning.quantities import format_bytes
from lightning_pipebd.planning.routing import moved_rows
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

__all__ = ["RunReport"]

_TARGETS = "targets"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run in numbers and pictures.

    Args:
        plan: Who computed what.
        traits: One entry per block: names, bytes of boundaries, and what decides about exactness.
        num_rows: Rows of a batch.
        summary: What the recorded steps took; see :func:`~lightning_pipebd.trace_summary.summarise`.
        timelines: Titles and spans, the predicted timeline first.
        losses: For each block steps and losses.
        outlook: What was foreseen; ``None`` if nothing was measured before.
        input_bytes_per_row: Bytes of a row of the model's input, if known.
        target_blocks: Student blocks whose loss reads the labels.
        has_momentum: Whether each teacher block follows its student block.
    """

    plan: Plan
    traits: Sequence[BlockTraits]
    num_rows: int
    summary: Mapping[str, Any]
    timelines: Mapping[str, Sequence[DrawnSpan]]
    losses: Mapping[int, Sequence[tuple[int, float]]]
    outlook: Outlook | None = None
    input_bytes_per_row: int | None = None
    target_blocks: Sequence[int] = ()
    has_momentum: bool = False

    def write(self, path: str | Path) -> None:
        """Write the page: Markdown with its pictures beside it, or one HTML file with its pictures in it.

        Args:
            path: File to write; its ending, ``.md`` or ``.html``, chooses.

        Raises:
            ImportError: matplotlib is not installed.
        """
        curves = {self._name(block): curve for block, curve in sorted(self.losses.items())}
        write_report(path, self.title, self.sections(), timelines=self.timelines, curves=curves)

    @property
    def title(self) -> str:
        """Name of the page."""
        return f"Run of {self.plan.num_blocks} blocks on {self.plan.num_ranks} ranks"

    def sections(self) -> list[Section]:
        """Give the page part by part."""
        return [
            Section("At a glance", table=[["", ""], *map(list, self._glance())]),
            timeline_section(self.timelines, "hatched is waiting"),
            ranks_section(self.summary, self.outlook),
            Section("Blocks", "Milliseconds per step, of all ranks of a block together.", self._block_table()),
            relay_section("What travels between ranks with every batch.", self._links()),
            losses_section("Of every block, by training step."),
            Section("Plan", verbatim=self._explanation()),
        ]

    def _glance(self) -> list[tuple[str, str]]:
        slowest = self.summary["slowest_block"]
        reasons = [reason.sentence for reason in exactness_reasons(self.plan, self.traits)]
        return [
            ("plan", format_plan(self.plan) if has_text_form(self.plan) else "see below"),
            ("exactness", " ".join([str(exactness_of(self.plan, self.traits)), *reasons[:1]])),
            *step_time_rows(self.num_rows, self.summary, self.outlook),
            ("slowest block", UNKNOWN if slowest is None else self._name(slowest)),
            ("relay traffic", self._traffic()),
        ]

    def _traffic(self) -> str:
        links = self._links()
        if not links:
            return "none"
        # How large labels are, nobody has measured.
        sizes = [link.num_bytes for link in links if link.what != _TARGETS]
        pairs = len({(link.sender, link.receiver) for link in links})
        known = UNKNOWN if None in sizes else f"{format_bytes(sum(filter(None, sizes)))} per step"
        also = ", and the targets" if len(sizes) < len(links) else ""
        return f"{known} over {pairs} connection{'s' if pairs > 1 else ''}{also}"

    def _block_table(self) -> list[list[str]]:
        found = {block["block"]: block for block in self.summary["blocks"]}
        table = [["block", "ranks", "TEACH", "predicted", "LEARN", "predicted", "last loss"]]
        for block in range(self.plan.num_blocks):
            times = found.get(block, {"teach": 0.0, "learn": 0.0})
            foreseen = self._foreseen(block)
            curve = self.losses.get(block, ())
            ranks = sorted({rank for rank, _ in self.plan.teacher[block]} | set(self.plan.student_ranks(block)))
            table.append(
                [
                    self._name(block),
                    ", ".join(map(str, ranks)),
                    f"{times['teach']:.2f}",
                    foreseen[0],
                    f"{times['learn']:.2f}",
                    foreseen[1],
                    f"{curve[-1][1]:.4g}" if curve else "-",
                ]
            )
        return table

    def _foreseen(self, block: int) -> tuple[str, str]:
        if self.outlook is None:
            return "-", "-"
        costs, cluster = self.outlook.measurement.costs, self.outlook.cluster
        sums = []
        for jobs, curve in ((self.plan.teacher_rows, "teach_ms"), (self.plan.student_rows, "learn_ms")):
            parts = jobs(block, self.num_rows).items()
            times = [
                getattr(costs.times(cluster.device_class[rank])[block], curve).at(rows.num_rows)
                for rank, rows in parts
                if not rows.is_empty
            ]
            sums.append(f"{sum(times):.2f}")
        return sums[0], sums[1]

    def _links(self) -> list[Link]:
        sizes = {0: self.input_bytes_per_row, TARGETS: None}
        sizes |= {block + 1: trait.boundary_bytes_per_row for block, trait in enumerate(self.traits)}
        moved = moved_rows(self.plan, self.num_rows, target_blocks=self.target_blocks)
        links = []
        for (sender, receiver, boundary), rows in moved.items():
            what, size = _TARGETS if boundary == TARGETS else f"boundary {boundary}", sizes[boundary]
            links.append(Link(sender, receiver, what, str(rows), None if size is None else size * rows))
        return links

    def _name(self, block: int) -> str:
        name = self.traits[block].name
        return f"{block} ({name})" if name else str(block)

    def _explanation(self) -> str:
        if self.outlook is not None:
            return str(self.outlook)
        return explain_plan(
            self.plan,
            self.traits,
            num_rows=self.num_rows,
            input_bytes_per_row=self.input_bytes_per_row,
            target_blocks=self.target_blocks,
            has_momentum=self.has_momentum,
        )
