"""Selection: one candidate for every place, the losses' sum as small as the size allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["select_candidates"]


class _Choice(NamedTuple):
    loss: float
    size: float
    numbers: tuple[int, ...]


def select_candidates(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], max_size: float | None = None
) -> tuple[int, ...]:
    """Give each place's candidate so that the sum of losses is least among all choices that are not too large.

    Exact: place after place, only choices are kept than which no other is both better and smaller.

    Args:
        losses: Per place, every candidate's loss.
        sizes: Per place, every candidate's size, for example its number of parameters.
        max_size: What all chosen candidates may have together; `None` for no limit.

    Raises:
        ValueError: Even the smallest candidates are too large together, or losses and sizes do not fit.

    Example:
        >>> select_candidates([[0.1, 0.5], [0.2, 0.3]], [[100, 10], [100, 10]], max_size=120)
        (0, 1)
    """
    if [len(place) for place in losses] != [len(place) for place in sizes]:
        raise ValueError(
            "`sizes` must have one entry for each of the losses, but have others. Give both per candidate."
        )
    smallest = sum(min(place) for place in sizes)
    if max_size is not None and smallest > max_size:
        msg = (
            f"`max_size` must leave room for the smallest candidates, which have {smallest:g} together, but is "
            f"{max_size:g}. Allow more, or offer smaller candidates."
        )
        raise ValueError(msg)
    choices = [_Choice(0.0, 0.0, ())]
    for place_losses, place_sizes in zip(losses, sizes, strict=True):
        extended = [
            _Choice(choice.loss + loss, choice.size + size, (*choice.numbers, number))
            for choice in choices
            for number, (loss, size) in enumerate(zip(place_losses, place_sizes, strict=True))
        ]
        choices = _drop_worse(extended, max_size)
    return min(choices).numbers


def _drop_worse(choices: list[_Choice], max_size: float | None) -> list[_Choice]:
    kept: list[_Choice] = []
    for choice in sorted(choices):
        is_smaller = not kept or choice.size < kept[-1].size
        if is_smaller and (max_size is None or choice.size <= max_size):
            kept.append(choice)
    return kept
