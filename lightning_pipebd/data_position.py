"""Where a run stands in its data: enough to go on in the middle of an epoch as if it had never stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_pipebd.runtime.random_streams import random_states, set_random_states

__all__ = ["DataPosition", "RandomMoment"]


class RandomMoment(NamedTuple):
    """The states of all random generators that loading draws from, at one moment, as plain data.

    Plain, so that a checkpoint that holds them loads with ``weights_only=True``.
    """

    states: dict[str, Any]
    own: list[torch.Tensor]

    @classmethod
    def now(cls, generators: Sequence[torch.Generator]) -> RandomMoment:
        """Take the states of torch, :mod:`random`, NumPy and the loader's own generators.

        Of torch's on GPUs, that of this rank's: batch hooks may draw from it.
        """
        states = random_states()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own function
            states["cuda"] = torch.cuda.get_rng_state()
        if "numpy" in states:
            name, keys, *rest = states["numpy"]
            states["numpy"] = (str(name), torch.from_numpy(keys.astype("int64")), *map(float, rest))
        return cls(states, [generator.get_state() for generator in generators])

    def drawn_until(self, later: RandomMoment) -> set[str]:
        """Name the generators whose state is another one at a later moment."""
        before, after = self._named(), later._named()
        return {name for name in before.keys() & after.keys() if not _is_same(before[name], after[name])}

    def for_generators(self, names: Collection[str], other: RandomMoment) -> RandomMoment:
        """Give these generators' states, and those of another moment for all others."""
        mine, theirs = self._named(), other._named()
        states = {name: mine[name] if name in names else state for name, state in theirs.items()}
        return RandomMoment(
            {name: states[name] for name in other.states}, [states[_own_name(own)] for own in range(len(other.own))]
        )

    def _named(self) -> dict[str, Any]:
        return self.states | {_own_name(own): state for own, state in enumerate(self.own)}

    def restore(self, generators: Sequence[torch.Generator]) -> None:
        """Put the generators back into these states."""
        states = dict(self.states)
        if "numpy" in states:
            name, keys, position, has_gauss, gauss = states["numpy"]
            states["numpy"] = (name, keys.numpy().astype("uint32"), int(position), int(has_gauss), gauss)
        states["python"] = (states["python"][0], tuple(states["python"][1]), states["python"][2])
        set_random_states(states)
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        for generator, state in zip(generators, self.own, strict=False):
            generator.set_state(state)


def _own_name(number: int) -> str:
    return f"generator {number} of the loader"


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if any(isinstance(part, torch.Tensor) for part in one):
        return all(
            _is_same(*parts) if isinstance(parts[0], torch.Tensor) else parts[0] == parts[1]
            for parts in zip(one, other, strict=True)
        )
    return bool(one == other)


class DataPosition(NamedTuple):
    """A place between two batches.

    Args:
        num_batches: Batches of the epoch that were trained.
        at_start: The random states with which the epoch's order was drawn.
        now: The random states after these batches; ``None`` if the epoch has not begun.
        loading: The random states before the next batch was loaded, if it was loaded already.
    """

    num_batches: int
    at_start: RandomMoment
    now: RandomMoment | None
    loading: RandomMoment | None = None

    def to_plain(self) -> dict[str, Any]:
        """Give plain data for a checkpoint."""
        now = None if self.now is None else list(self.now)
        plain = {"num_batches": self.num_batches, "at_start": list(self.at_start), "now": now}
        return plain if self.loading is None else {**plain, "loading": list(self.loading)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> DataPosition:
        """Read back what :meth:`to_plain` gave."""
        now = None if data["now"] is None else RandomMoment(*data["now"])
        loading = RandomMoment(*data["loading"]) if "loading" in data else None
        return cls(data["num_batches"], RandomMoment(*data["at_start"]), now, loading)
