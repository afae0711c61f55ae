"""A run on one page: the plan, prediction beside truth, the ranks' time, the relay, the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_pipebd.planning.explain import BlockTraits, exactness_of, exactness_reasons, explain_plan
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.program import TARGETS
from lightning_pipebd.planning.quantities import format_bytes
from lightning_pipebd.planning.routing import moved_rows
from lightning_pipebd.plots import DrawnSpan, draw_losses, draw_timelines
from lightning_pipebd.report_page import Section, write_page

__all__ = ["RunReport", "describe_prediction"]

_UNKNOWN = "unknown"


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

    def write(self, path: str | Path) -> None:
        """Write the page: Markdown with its pictures beside it, or one HTML file with its pictures in it.

        Args:
            path: File to write; its ending, ``.md`` or ``.html``, chooses.

        Raises:
            ImportError: matplotlib is not installed.
        """
        curves = {self._name(block): curve for block, curve in sorted(self.losses.items())}
        pictures = {
            "timeline.svg": partial(draw_timelines, timelines=self.timelines),
            "losses.svg": partial(draw_losses, curves=curves),
        }
        write_page(path, self.title, self.sections(), pictures)

    @property
    def title(self) -> str:
        """Name of the page."""
        return f"Run of {self.plan.num_blocks} blocks on {self.plan.num_ranks} ranks"

    def sections(self) -> list[Section]:
        """Give the page part by part."""
        both = "Predicted above measured, on one scale; hatched is waiting."
        return [
            Section("At a glance", table=[["", ""], *map(list, self._glance())]),
            Section("Timeline", both if len(self.timelines) > 1 else "Measured.", picture="timeline.svg"),
            Section("Ranks", "Milliseconds per step; RECV, SEND and REDUCE are no work.", self._rank_table()),
            Section("Blocks", "Milliseconds per step, of all ranks of a block together.", self._block_table()),
            Section("Relay", "What travels between ranks with every batch.", self._relay_table()),
            Section("Losses", "Of every block, by training step.", picture="losses.svg"),
            Section("Plan", verbatim=self._explanation()),
        ]

    def _glance(self) -> list[tuple[str, str]]:
        measured, bubble = self.summary["step_time_ms"], self.summary["bubble_fraction"]
        slowest = self.summary["slowest_block"]
        reasons = [reason.sentence for reason in exactness_reasons(self.plan, self.traits)]
        return [
            ("plan", format_plan(self.plan) if has_text_form(self.plan) else "see below"),
            ("exactness", " ".join([str(exactness_of(self.plan, self.traits)), *reasons[:1]])),
            ("rows of a batch", str(self.num_rows)),
            ("predicted step", describe_prediction(self.outlook, measured)),
            ("measured step", f"{measured:.4g} ms, over {self.summary['steps']} steps"),
            ("bubble share", f"{bubble:.0%} of the ranks' time is not work"),
            ("slowest block", _UNKNOWN if slowest is None else self._name(slowest)),
            ("relay traffic", self._traffic()),
        ]

    def _traffic(self) -> str:
        links = self._links()
        if not links:
            return "none"
        # How large labels are, nobody has measured.
        sizes = [size for _, _, boundary, _, size in links if boundary != TARGETS]
        pairs = len({(sender, receiver) for sender, receiver, *_ in links})
        known = _UNKNOWN if None in sizes else f"{format_bytes(sum(filter(None, sizes)))} per step"
        also = ", and the targets" if len(sizes) < len(links) else ""
        return f"{known} over {pairs} connection{'s' if pairs > 1 else ''}{also}"

    def _rank_table(self) -> list[list[str]]:
        kinds = ("load", "recv", "teach", "learn", "send", "reduce", "update")
        predicted = self.outlook.judgement.busy_ms if self.outlook is not None else ()
        step_ms = self.outlook.step_time_ms if self.outlook is not None else 0.0
        table = [["rank", *(kind.upper() for kind in kinds), "at work", "predicted"]]
        for found in self.summary["ranks"]:
            rank = found["rank"]
            foreseen = f"{predicted[rank] / step_ms:.0%}" if step_ms else "-"
            cells = [f"{found[kind]:.2f}" for kind in kinds]
            table.append([str(rank), *cells, f"{found['utilisation']:.0%}", foreseen])
        return table

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

    def _links(self) -> list[tuple[int, int, int, int, int | None]]:
        sizes = {0: self.input_bytes_per_row, TARGETS: None}
        sizes |= {block + 1: trait.boundary_bytes_per_row for block, trait in enumerate(self.traits)}
        moved = moved_rows(self.plan, self.num_rows, target_blocks=self.target_blocks)
        return [
            (*link, rows, None if (size := sizes[link.boundary]) is None else size * rows)
            for link, rows in moved.items()
        ]

    def _relay_table(self) -> list[list[str]]:
        table = [["from", "to", "what", "rows", "bytes per step"]]
        for sender, receiver, boundary, rows, size in self._links():
            what = "targets" if boundary == TARGETS else f"boundary {boundary}"
            table.append(
                [str(sender), str(receiver), what, str(rows), _UNKNOWN if size is None else format_bytes(size)]
            )
        return table

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
        )


def describe_prediction(outlook: Outlook | PipelineOutlook | None, measured_ms: float) -> str:
    """Say what a step was foreseen to take, beside what it took."""
    if outlook is None:
        return "none: the plan was given, and nothing was measured"
    predicted = outlook.step_time_ms
    off = f", the measured one is {measured_ms / predicted - 1:+.0%} off" if predicted else ""
    return f"{predicted:.4g} ms{off}"
