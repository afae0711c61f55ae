"""pipebd against the other ways to distil the same blocks: same module, same whole batch, same losses, two cores.

    python -m benchmarks.baselines.main

Two processes of one thread each (one where the name says so), all variants interleaved, because a machine's speed
drifts. What is compared, in the words of Pipe-BD (arXiv:2301.12443) in brackets:

    one process              plain Lightning
    joint DDP                all blocks in every process, each with half of the batch
    block after block, DDP   each block for itself, the teacher's beginning run again for it ("DP", also DNA's way)
    blocks apart             each block for itself in one of two processes, packed as well as can be ("LS")
    ... one teacher          the same, but a process trains all of its blocks at once, from one run of the teacher
    relay with barrier       pipebd, and all ranks wait for each other before every update ("TR")
    pipebd                   straight ("TR + DPU"), joint, and automatic
    ceiling                  two processes that do not talk train on batches of their own: half of their step time

On two ranks a hybrid plan is either the joint or the straight one. Automatic runs measure the blocks anew each time;
the first one's times are what straight plans and packings are chosen by, and the column "by arithmetic": the times of
the blocks on a whole batch in one process, added up for the busiest process, without communication.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from benchmarks.baselines.models import WORKLOADS
from benchmarks.baselines.variants import AUTOMATIC, VARIANTS, Chores, Result, Steps
from benchmarks.shared.tables import interleave, markdown_table, ratios, spread
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import format_plan

_OWN = ("pipebd, straight", "pipebd, joint")
_OTHERS = tuple(name for name in VARIANTS if name not in (*_OWN, AUTOMATIC, "ceiling"))
_MIB = 2**20


def measure(workload: str, variants: Sequence[str], repeats: int, steps: Steps) -> dict[str, list[Result]]:
    """Run all variants in turn; the automatic one is always among them, and the first."""
    chores = Chores((), (), 0.0)

    def run(name: str) -> Result:
        nonlocal chores
        sys.stderr.write(f"{workload}: {name}\n")
        result = VARIANTS[name].run(workload, chores, steps)
        if name == AUTOMATIC and not chores.teach_ms and result.outlook is not None:
            chores = Chores.read(result.outlook)
        return result

    return interleave([name for name in VARIANTS if name == AUTOMATIC or name in variants], repeats, run)


def report(workload: str, found: dict[str, list[Result]]) -> str:
    """Give the table of a workload, and what the claims make of it."""
    outlooks = [result.outlook for result in found[AUTOMATIC] if result.outlook is not None]
    chores = Chores.read(outlooks[0])
    times = {name: [result.ms for result in results] for name, results in found.items()}
    rows = []
    for name, results in found.items():
        memory = zip(*(result.own_bytes for result in results), strict=True)
        expected_ms = outlooks[0].step_time_ms if name == AUTOMATIC else VARIANTS[name].expected_ms(chores)
        rows.append(
            {
                "variant": name + (" *" if _is_another_student(name, outlooks[0]) else ""),
                "ms per batch": f"{spread(times[name]):.1f}",
                "this / automatic": f"{ratios(times[name], times[AUTOMATIC]):.2f}",
                "ceiling / this": f"{ratios(times['ceiling'], times[name]):.2f}" if "ceiling" in times else "",
                "by arithmetic": f"{expected_ms:.1f}",
                "MiB per process": " / ".join(f"{statistics.median(sizes) / _MIB:.0f}" for sizes in memory),
                "foreseen MiB": _foreseen_memory(name, outlooks[0]),
            }
        )
    lines = [f"**{workload}**: {WORKLOADS[workload].description}", "", markdown_table(list(rows[0]), rows), ""]
    return "\n".join(lines + [f"* {line}" for line in _findings(times, chores, outlooks)])


def _findings(times: dict[str, list[float]], chores: Chores, outlooks: Sequence[Outlook]) -> list[str]:
    """Say what became of each claim."""
    plans = sorted({f"`{format_plan(outlook.plan)}`" for outlook in outlooks})
    foreseen = ", ".join(f"{outlook.step_time_ms:.1f}" for outlook in outlooks)
    straight = format_plan(chores.straight_plan)
    lines = [f"automatic plans: {', '.join(plans)}; foreseen {foreseen} ms; straight plan: `{straight}`"]
    others = {name: times[name] for name in _OTHERS if name in times}
    if others:
        best = min(others, key=lambda name: statistics.median(others[name]))
        lines.append(f"best baseline ({best}) / automatic: {ratios(others[best], times[AUTOMATIC]):.2f}")
    own = {name: times[name] for name in _OWN if name in times}
    if own:
        best = min(own, key=lambda name: statistics.median(own[name]))
        lines.append(f"best simple plan ({best}) / automatic: {ratios(own[best], times[AUTOMATIC]):.2f}")
    bound = chores.in_turn_ms(chores.all_blocks) / chores.task_ms(chores.all_blocks)
    lines.append(f"block after block costs {bound:.2f} times the work, by arithmetic")
    return lines


def _is_another_student(name: str, outlook: Outlook) -> bool:
    """Tell whether divided rows change what the student learns: its BatchNorm sees a part of the batch."""
    return VARIANTS[name].divides_rows and any(trait.has_batch_statistics for trait in outlook.measurement.traits)


def _foreseen_memory(name: str, outlook: Outlook) -> str:
    """Give what the memory model says each rank's device needs, where it has a plan to judge."""
    num_blocks = outlook.measurement.costs.num_blocks
    plans = {
        AUTOMATIC: outlook.plan,
        "one process": Plan.straight([num_blocks]),
        "ceiling": Plan.straight([num_blocks]),
        "joint DDP": Plan.joint(num_blocks, 2),
        "pipebd, joint": Plan.joint(num_blocks, 2),
        "pipebd, straight": Chores.read(outlook).straight_plan,
        "relay with barrier": Chores.read(outlook).straight_plan,
    }
    if name not in plans:
        return ""
    num_ranks = 1 if name in ("one process", "ceiling") else 2
    cluster = Cluster.uniform(num_ranks, device_class=outlook.measurement.costs.devices[0].device_class)
    foreseen = Outlook(plan=plans[name], measurement=outlook.measurement, cluster=cluster)
    return " / ".join(f"{use.total_bytes / _MIB:.0f}" for use in foreseen.judgement.memory)


def main(words: Sequence[str] | None = None) -> None:
    """Measure workload by workload, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WORKLOADS)[:-1], choices=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each run")
    arguments = parser.parse_args(words)
    # The queues hold up to four steps; where less is measured, nobody looks at the numbers.
    steps = Steps(min(4, 2 * arguments.steps), arguments.steps, min(2, arguments.steps - 1))
    for workload in arguments.models:
        found = measure(workload, arguments.variants, arguments.repeats, steps)
        sys.stdout.write(f"\n{report(workload, found)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
