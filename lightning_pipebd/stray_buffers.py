"""Buffers that belong to no block, such as a centre that a loss moves: the rank that changed one tells the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from lightning_pipebd.checkpoint import fingerprint
from lightning_pipebd.runtime.transport import Transport

__all__ = ["StrayBuffers"]


class StrayBuffers:
    """Tells which rank's values of a module's other buffers count.

    A plan says who has a block; of a buffer outside of them it shows only afterwards, by who has changed it.

    Args:
        module: Has the buffers.
        owned_tensors: Gives groups of tensors that belong to blocks, each with its rank; asked anew each time, because
            buffers that move to another device are other tensors.
    """

    def __init__(self, module: nn.Module, owned_tensors: Callable[[], Sequence[tuple[list[Tensor], int]]]) -> None:
        self._module = module
        self._owned_tensors = owned_tensors
        self._warned: set[str] = set()
        self._known = self._fingerprints()

    def owned(self, transport: Transport) -> list[tuple[list[Tensor], int]]:
        """**Collective** over all ranks: give each buffer that has changed, with the rank whose values count.

        Where ranks have changed one differently, that is the first of them, with a warning.
        """
        if not self._known:
            return []
        now = self._fingerprints()
        mine = {name: value for name, value in now.items() if value != self._known.get(name)}
        everyone = transport.all_gather_object(mine)
        return [
            ([self._module.get_buffer(name)], rank)
            for name in now
            if (rank := self._owner(name, everyone, is_told=transport.rank == 0)) is not None
        ]

    def settle(self) -> None:
        """Take the present values, which all ranks have, for the known ones."""
        self._known = self._fingerprints()

    def _owner(self, name: str, everyone: Sequence[Mapping[str, bytes]], *, is_told: bool) -> int | None:
        ranks = [rank for rank, changed in enumerate(everyone) if name in changed]
        if len({everyone[rank][name] for rank in ranks}) > 1 and is_told and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"The buffer `{name}` belongs to no block, and ranks {', '.join(map(str, ranks))} changed it in "
                f"different ways: that of rank {ranks[0]} is kept. Give each block a buffer of its own, in an adapter.",
                stacklevel=2,
            )
        return ranks[0] if ranks else None

    def _fingerprints(self) -> dict[str, bytes]:
        owned = {id(tensor) for tensors, _ in self._owned_tensors() for tensor in tensors}
        return {name: fingerprint(buffer) for name, buffer in self._module.named_buffers() if id(buffer) not in owned}
