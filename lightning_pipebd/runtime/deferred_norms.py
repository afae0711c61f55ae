"""Running statistics over micro-batches: gathered, and taken into account once for each batch.

A BatchNorm that sees a batch in micro-batches normalises each by its own statistics; nothing can be done about that
without waiting for the whole batch. But its running statistics would also move once per micro-batch, by other values:
here they move once per batch, by the mean and the variance over all rows.

Source: Kim et al., "torchgpipe: On-the-fly Pipeline Parallelism for Training Giant Models" (2020), "Deferred Batch
Normalization"; here the variance is that of the batch, and views are kept apart. With replicas each has rows of the
batch, and all take into account the rows of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["DeferredNorms"]

_NAMES = ("running_mean", "running_var", "num_batches_tracked")


class _Moments(NamedTuple):
    """Sums over the rows seen so far."""

    num_values: float
    first: Tensor
    second: Tensor


class DeferredNorms:
    """Defers the running statistics of some blocks.

    Args:
        blocks: Per block its modules.
        share: **Collective** over the ranks that have these blocks: sums tensors of float64 in place; ``None`` where
            there are no others.

    Example:
        >>> norm = nn.BatchNorm1d(1, momentum=0.5)
        >>> norms = DeferredNorms({0: [norm]})
        >>> with norms.batch():
        ...     for part in (torch.zeros(2, 1), torch.full((2, 1), 4.0)):
        ...         norms.begin(0)
        ...         _ = norm(part)
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([1.]), tensor(1))
    """

    def __init__(
        self, blocks: Mapping[int, Sequence[nn.Module]], share: Callable[[Sequence[Tensor]], None] | None = None
    ) -> None:
        self._share = share
        self._norms = {
            block: [
                inner
                for module in modules
                for inner in module.modules()
                if isinstance(inner, _BatchNorm) and inner.running_mean is not None
            ]
            for block, modules in blocks.items()
        }
        self._calls: dict[int, int] = {}
        self._found: defaultdict[int, dict[int, _Moments]] = defaultdict(dict)
        self._kept: dict[int, tuple[dict[str, Any], float | None]] = {}

    def __bool__(self) -> bool:
        return any(self._norms.values())

    def begin(self, block: int) -> None:
        """Begin a micro-batch: a block that is called for several views has statistics for each."""
        for norm in self._norms.get(block, ()):
            self._calls[id(norm)] = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Defer statistics inside the context, and take them into account at its end unless it fails."""
        norms = [norm for own in self._norms.values() for norm in own]
        handles = [
            handle
            for norm in norms
            for handle in (
                norm.register_forward_pre_hook(self._put_aside),
                norm.register_forward_hook(self._put_back, always_call=True),
            )
        ]
        try:
            yield
            if self._share is not None:
                self._take_all(norms, self._share)
            for norm in norms:
                self._commit(norm)
        finally:
            self._found.clear()
            for handle in handles:
                handle.remove()

    def _put_aside(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if not norm.training:
            return
        kept = {name: norm._buffers[name] for name in _NAMES}
        self._kept[id(norm)] = (kept, norm.momentum)
        # With this momentum the layer leaves the micro-batch's own statistics in its buffers.
        norm.momentum = 1.0
        for name, buffer in kept.items():
            norm._buffers[name] = None if buffer is None else torch.zeros_like(buffer)

    def _put_back(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(norm, _BatchNorm)
        kept = self._kept.pop(id(norm), None)
        if kept is None:
            return
        mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
        buffers, norm.momentum = kept
        norm._buffers.update(buffers)
        if not isinstance(output, Tensor):
            return
        assert mean is not None
        assert variance is not None
        count = output.numel() / mean.numel()
        number = self._calls.get(id(norm), 0)
        self._calls[id(norm)] = number + 1
        first, second = mean.double() * count, variance.double() * (count - 1) + mean.double().square() * count
        known = self._found[id(norm)].get(number)
        if known is not None:
            count, first, second = known.num_values + count, known.first + first, known.second + second
        self._found[id(norm)][number] = _Moments(count, first, second)

    def _take_all(self, norms: Sequence[_BatchNorm], share: Callable[[Sequence[Tensor]], None]) -> None:
        """Take the sums over the rows of all replicas; one without rows learns from the others what there is."""
        device = next((norm.running_mean.device for norm in norms if norm.running_mean is not None), None)
        counts = [float(len(self._found.get(id(norm), ()))) for norm in norms]
        known = torch.tensor([*counts, float(bool(self._found))], dtype=torch.float64, device=device)
        share([known])
        *totals, num_present = known.tolist()
        sums: dict[tuple[int, int], Tensor] = {}
        for norm, total in zip(norms, totals, strict=True):
            assert norm.running_mean is not None
            for number in range(round(total / max(num_present, 1.0))):
                own = self._found[id(norm)].get(number)
                nothing = torch.zeros(1 + 2 * norm.running_mean.numel(), dtype=torch.float64, device=device)
                sums[id(norm), number] = nothing if own is None else _flat(own)
        share(list(sums.values()))
        for (norm_id, number), flat in sums.items():
            first, second = flat[1:].chunk(2)
            self._found[norm_id][number] = _Moments(float(flat[0]), first, second)

    def _commit(self, norm: _BatchNorm) -> None:
        """Move the running statistics as the layer would have done for the whole batch."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        for _, moments in sorted(self._found.get(id(norm), {}).items()):
            mean = moments.first / moments.num_values
            variance = (moments.second - moments.num_values * mean.square()) / max(moments.num_values - 1, 1)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            momentum = norm.momentum
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked or 1)
            norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
            norm.running_var.lerp_(variance.to(norm.running_var), momentum)


def _flat(moments: _Moments) -> Tensor:
    return torch.cat([moments.first.new_tensor([moments.num_values]), moments.first, moments.second])
