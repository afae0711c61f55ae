"""What one GPU does with blocks: plain PyTorch, the module, pipebd, compiled, in bfloat16, with channels last.

    python -m benchmarks.gpu.main
    python -m benchmarks.gpu.main --device cpu --small

All variants train the same blocks of the same pair on the same batches with Adam, in turns. *plain PyTorch* is a loop
over the blocks, written by hand. A turn's time is that of its measured steps together, from one synchronisation with
the device to another; figures are medians over the turns, with the least and the greatest, and ratios are taken within
a turn. Floating-point operations are those that `torch.utils.flop_counter` counts in a step by hand; the peak that
they are held against is what a large product of matrices reaches on this device, in float32 as torch is set, and in
bfloat16 for the variant in bfloat16.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.models import Distil, Rows, Workload
from benchmarks.gpu.models import MODELS, SMALL_MODELS
from benchmarks.shared.tables import interleave, markdown_table, ratios, spread
from benchmarks.shared.training import forget_peak_memory, peak_memory_bytes, plain_trainer
from lightning_pipebd.losses import resolve_loss
from lightning_pipebd.runtime.partition import call_block

_NUM_BATCHES = 4
_BY_HAND = "plain PyTorch"


@dataclass(frozen=True)
class Variant:
    """One way to train the blocks.

    Args:
        strategy: Of the trainer; `None` is the loop by hand.
        options: Of the module.
        precision: Of the trainer.
        channels_last: Whether images and convolutions have their channels last.
        needs_gpu: Whether it says nothing on a CPU.
    """

    strategy: str | None = "pipebd"
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    channels_last: bool = False
    needs_gpu: bool = False


VARIANTS = {
    _BY_HAND: Variant(strategy=None),
    'module, "auto"': Variant(strategy="auto"),
    "pipebd": Variant(),
    "pipebd, compiled": Variant(options={"compile": True}, needs_gpu=True),
    "pipebd, CUDA graphs": Variant(options={"compile": {"mode": "reduce-overhead"}}, needs_gpu=True),
    "pipebd, bf16-mixed": Variant(precision="bf16-mixed"),
    "pipebd, channels last": Variant(channels_last=True),
}


class Turn(NamedTuple):
    """What was measured of some steps."""

    step_ms: float
    peak_bytes: int


class Clock(Callback):
    """Times the steps after the first ones, and finds the most memory held meanwhile.

    On a GPU, what is held when the clock is made is not counted: graphs of other variants keep their memory.

    Args:
        device: Computes.
        num_skipped: Steps that warm up, compile and record.
        num_measured: Steps that count.
    """

    def __init__(self, device: torch.device, num_skipped: int, num_measured: int) -> None:
        self._device = device
        self._held_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._edges = (num_skipped, num_skipped + num_measured)
        self._num_steps = 0
        self._start_s = 0.0
        self.turn: Turn | None = None

    def note(self) -> None:
        """Take note that a step was begun on the device."""
        self._num_steps += 1
        if self._num_steps not in self._edges:
            return
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self._device)
        now_s = time.perf_counter()
        if self._num_steps == self._edges[1]:
            peak = torch.cuda.max_memory_allocated(self._device) if is_cuda else peak_memory_bytes()
            step_ms = (now_s - self._start_s) / (self._edges[1] - self._edges[0]) * 1000
            self.turn = Turn(step_ms, peak - self._held_bytes)
            return
        torch.cuda.reset_peak_memory_stats(self._device) if is_cuda else forget_peak_memory()
        self._start_s = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.note()


class ByHand:
    """A loop over the blocks of a module, without the module."""

    def __init__(self, module: Distil, device: torch.device) -> None:
        self._module, self._device = module, device

    def train(self, batches: Sequence[Tensor], clock: Clock) -> None:
        """Take one step per batch."""
        self._module.to(self._device)
        optimizer = torch.optim.Adam(self._module.student.parameters(), lr=1e-4)
        for batch in batches:
            self.step(batch, optimizer)
            clock.note()
        self._module.cpu()

    def step(self, batch: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Take one step."""
        pairs, losses = self._module.block_pairs, self._module.workload.losses
        optimizer.zero_grad()
        boundary = batch.to(self._device)
        for path, theirs, mine in zip(
            self._module.workload.paths, pairs.teacher.blocks, pairs.student.blocks, strict=True
        ):
            with torch.no_grad():
                output = call_block(theirs, boundary)
            resolve_loss(losses.get(path, "mse"))(call_block(mine, boundary), output).backward()
            boundary = output
        optimizer.step()

    def count_flops(self, batch: Tensor) -> int:
        """Count the floating-point operations of a step."""
        self._module.to(self._device)
        optimizer = torch.optim.Adam(self._module.student.parameters(), lr=1e-4)
        with FlopCounterMode(display=False) as counter:
            self.step(batch, optimizer)
        self._module.cpu()
        return int(counter.get_total_flops())


class Contender:
    """A variant with a module of its own, which stays compiled from turn to turn; in host memory in between."""

    def __init__(self, variant: Variant, workload: Workload, device: torch.device) -> None:
        torch.manual_seed(0)
        self.variant, self._device = variant, device
        self.module = Distil(workload, **variant.options)
        if variant.channels_last:
            self.module.to(memory_format=torch.channels_last)

    def train(self, batches: Sequence[Tensor], clock: Clock) -> Turn:
        """Take one step per batch."""
        if self.variant.channels_last:
            batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
        if self.variant.strategy is None:
            ByHand(self.module, self._device).train(batches, clock)
        else:
            trainer = plain_trainer(
                self.variant.strategy,
                1,
                [clock],
                accelerator="cpu" if self._device.type == "cpu" else "gpu",
                precision=self.variant.precision,
            )
            trainer.fit(self.module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # a list will do
        assert clock.turn is not None
        return clock.turn


def with_one_teacher(workload: Workload) -> Workload:
    """Give a workload whose pairs all have the first one's teacher: it is frozen, and may be large.

    Students are made as before, after a teacher that is thrown away.
    """
    kept: list[nn.Module] = []

    def models() -> tuple[nn.Module, nn.Module]:
        teacher, student = workload.models()
        if not kept:
            kept.append(teacher)
        return kept[0], student

    return replace(workload, models=models)


def peak_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Give the floating-point operations per second that a product of square matrices reaches, the best of some."""
    first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        first @ second
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s


def make_batches(workload: Workload, num_steps: int) -> list[Tensor]:
    """Give as many batches as steps, of which a few are different."""
    rows = Rows(workload.example(), workload.batch_size * _NUM_BATCHES)
    size = workload.batch_size
    made = [
        torch.stack([rows[index] for index in range(size * number, size * (number + 1))])
        for number in range(_NUM_BATCHES)
    ]
    return [made[step % _NUM_BATCHES] for step in range(num_steps)]


def measure(workload: Workload, names: Sequence[str], settings: argparse.Namespace) -> str:
    """Train all variants in turn; give the table, and what went wrong."""
    device = torch.device(settings.device)
    batches = make_batches(workload, settings.warm_up + settings.steps)
    chosen = [name for name in names if batches[0].dim() == 4 or not VARIANTS[name].channels_last]
    shared = with_one_teacher(workload)
    # Channels are put last in the teacher, too.
    contenders = {
        name: Contender(VARIANTS[name], workload if VARIANTS[name].channels_last else shared, device) for name in chosen
    }
    flops = ByHand(Contender(VARIANTS[_BY_HAND], shared, device).module, device).count_flops(batches[0])
    size = 512 if settings.small else 8192
    peaks = {dtype: peak_flops(device, dtype, size) for dtype in (torch.float32, torch.bfloat16)}
    failures: dict[str, str] = {}

    def run(name: str) -> Turn | None:
        sys.stderr.write(f"{name}\n")
        if name in failures:
            return None
        try:
            return contenders[name].train(batches, Clock(device, settings.warm_up, settings.steps))
        except RuntimeError as error:
            # One way to compute may not work, or not fit, on a device: the others are worth their time all the same.
            failures[name] = " ".join(str(error).split())[:200]
            return None

    turns = interleave(contenders, settings.repeats, run)
    whole = {
        name: [turn for turn in found if turn is not None] for name, found in turns.items() if name not in failures
    }
    rates = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {dtype}" for dtype, rate in peaks.items())
    facts = f"{flops / 1e9:.2f} GFLOP per step; a product of {size} x {size} reaches {rates}."
    failed = [f"* {name} failed: {message}" for name, message in failures.items()]
    return "\n".join([workload.description, "", facts, "", tabulate(whole, flops, peaks), *failed])


def tabulate(turns: Mapping[str, Sequence[Turn]], flops: int, peaks: Mapping[torch.dtype, float]) -> str:
    """Give the table of the variants."""
    rows = []
    for name, found in turns.items():
        times = [turn.step_ms for turn in found]
        peak = peaks[torch.bfloat16 if VARIANTS[name].precision.startswith("bf16") else torch.float32]
        row = {
            "variant": name,
            "steps per second": f"{spread([1000 / ms for ms in times]):.2f}",
            "ms per step": f"{statistics.median(times):.2f}",
            "peak MiB": f"{max(turn.peak_bytes for turn in found) / 2**20:.0f}",
            "of the peak": f"{flops / (statistics.median(times) / 1000) / peak:.1%}",
        }
        if _BY_HAND in turns:
            row["speed / plain PyTorch"] = f"{ratios([turn.step_ms for turn in turns[_BY_HAND]], times):.3f}"
        rows.append(row)
    header = ["variant", "steps per second", "ms per step", "speed / plain PyTorch", "peak MiB", "of the peak"]
    return markdown_table(header, rows)


def describe(device: torch.device) -> str:
    """Say what computes, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    precision = torch.get_float32_matmul_precision()
    versions = f"torch {torch.__version__}, Lightning {lightning.__version__}, CUDA {torch.version.cuda}"
    return (
        f"Device: {name} ({device.type}); {versions}; float32 products: {precision}, {torch.get_num_threads()} threads"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure model by model, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=None)
    parser.add_argument("--small", action="store_true", help="models and products that a CPU computes in no time")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a turn")
    parser.add_argument("--warm-up", type=int, default=8, help="steps of a turn before them")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    settings = parser.parse_args(words)
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here. Choose `--device cpu --small` to see that everything runs.")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = settings.variants or [
        name for name, variant in VARIANTS.items() if settings.device == "cuda" or not variant.needs_gpu
    ]
    sys.stdout.write(f"{describe(torch.device(settings.device))}\n")
    models: Mapping[str, Callable[[], Workload]] = SMALL_MODELS if settings.small else MODELS
    for name in settings.models:
        sys.stdout.write(f"\n**{name}**: {measure(models[name](), names, settings)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
