"""Suggests a block map: where two models that have run on one input look alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_pipebd.runtime.partition import PartitionError, cut_model
from lightning_pipebd.runtime.side_effects import preserved_modes

__all__ = ["SuggestedPair", "suggest_block_map"]

# A pair of equal shapes is worth more than one that needs an adapter, but only if it is not far off the diagonal.
_EQUAL, _ADAPTED, _OFF_DIAGONAL = 1.0, 0.4, 1.5


class SuggestedPair(NamedTuple):
    """Two modules after which the activations may be made to match.

    Args:
        teacher: Path of the teacher's module.
        student: Path of the student's module.
        teacher_shape: Shape of the teacher's activation, as its input was given.
        student_shape: Shape of the student's; an adapter is needed where it differs.
    """

    teacher: str
    student: str
    teacher_shape: tuple[int, ...]
    student_shape: tuple[int, ...]

    @property
    def needs_adapter(self) -> bool:
        """Whether the shapes differ."""
        return self.teacher_shape != self.student_shape


class _Place(NamedTuple):
    """A module after which a model can be cut.

    Args:
        path: Path of the module.
        shape: Shape of the activation.
        progress: Share of the model's parameters up to there.
        ends_stage: Whether another resolution follows.
    """

    path: str
    shape: tuple[int, ...]
    progress: float
    ends_stage: bool = False

    @property
    def resolution(self) -> tuple[int, ...]:
        """The shape without the channels."""
        channels = 1 if len(self.shape) == 4 else len(self.shape) - 1
        return self.shape[:channels] + self.shape[channels + 1 :]


def suggest_block_map(teacher: nn.Module, student: nn.Module, example: Tensor) -> list[SuggestedPair]:
    """Give pairs of modules, in order, at which both models can be cut and whose activations look alike.

    Both models run once in ``eval()``. Activations of equal shape are paired before activations that agree in all but
    the channels, and places that lie equally far through the two models before others; the models' outputs are always
    the last pair. It is a start: which blocks learn well is for you to find out.

    Args:
        teacher: The teacher; unchanged afterwards.
        student: The student; unchanged afterwards.
        example: An input of both.

    Raises:
        PartitionError: A model's output is no tensor, or the two give outputs of different shapes.

    Example:
        >>> deep = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> flat = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> [(pair.teacher, pair.student) for pair in suggest_block_map(deep, flat, torch.zeros(1, 4))]
        [('2', '0'), ('3', '1')]
    """
    teachers, students = _find_places(teacher, example, "teacher"), _find_places(student, example, "student")
    if teachers[-1].shape != students[-1].shape:
        msg = (
            f"`student` must give an output of the teacher's shape, but gives {students[-1].shape} instead of "
            f"{teachers[-1].shape}. Change its last module, for example the number of classes."
        )
        raise PartitionError(msg)
    pairs = _drop_idle([*_align(teachers[:-1], students[:-1]), (teachers[-1], students[-1])])
    return [SuggestedPair(mine.path, theirs.path, mine.shape, theirs.shape) for mine, theirs in pairs]


def _find_places(model: nn.Module, example: Tensor, role: str) -> list[_Place]:
    calls = _run(model, example)
    # Nested modules that end together give the same activation: the outermost name is the simplest, if it is a name.
    outermost: dict[int, str] = {}
    for path, value in calls:
        known = outermost.setdefault(id(value), path)
        if path and (path.count("."), not known) < (known.count("."), bool(known)):
            outermost[id(value)] = path
    shapes = {id(value): tuple(value.shape) for _, value in calls}
    output = id(calls[-1][1])
    inner = [(path, shapes[key]) for key, path in outermost.items() if key != output and len(shapes[key]) > 1]
    cuttable = [(path, shape) for path, shape in inner if _can_cut(model, path, role)]
    cuttable.append((outermost[output], shapes[output]))
    names = [path for path, _ in cuttable]
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    sizes = [size / total for size in _parameters_up_to(model, names, min_dims=0)]
    places = [_Place(path, shape, size) for (path, shape), size in zip(cuttable, sizes, strict=True)]
    # What follows a matrix without another one (normalisation, activation, pooling that keeps the shape) belongs to it.
    matrices = _parameters_up_to(model, names, min_dims=2)
    places = [
        place
        for index, place in enumerate(places)
        if index + 1 == len(places) or places[index + 1].shape != place.shape or matrices[index + 1] > matrices[index]
    ]
    followers = [place.resolution for place in places[1:]]
    return [
        place._replace(ends_stage=place.resolution != follower)
        for place, follower in zip(places, [*followers, None], strict=True)
    ]


def _run(model: nn.Module, example: Tensor) -> list[tuple[str, Tensor]]:
    """Run the model; give the modules that are called once and return a tensor, in the order in which they end.

    The last is the model itself, under the empty path.
    """
    calls: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_hook(lambda _module, _given, output, path=path: calls.append((path, output)))
        for path, module in model.named_modules()
    ]
    try:
        with preserved_modes(model.modules()), torch.no_grad():
            model.eval()
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(calls[-1][1], Tensor):
        kind = type(calls[-1][1]).__name__
        raise PartitionError(
            f"A model must return a tensor for a suggestion, but one returns a {kind}. List its blocks."
        )
    paths = [path for path, _ in calls]
    return [(path, value) for path, value in calls if isinstance(value, Tensor) and paths.count(path) == 1]


def _can_cut(model: nn.Module, path: str, role: str) -> bool:
    try:
        # To the end of the model: what passes the boundary aside of it, as a residual does, shows only there.
        cut_model(model, [path, ""], role=role)
    except PartitionError:
        return False
    return True


def _parameters_up_to(model: nn.Module, paths: Sequence[str], *, min_dims: int) -> list[int]:
    """Count the elements of the parameters up to the end of each module; of matrices alone, if asked."""
    counted: set[int] = set()
    sizes, done = [], 0
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            is_new = parameter.dim() >= min_dims and id(parameter) not in counted
            done += parameter.numel() if is_new else 0
            counted.add(id(parameter))
        sizes.append(done)
    return sizes


def _drop_idle(pairs: Sequence[tuple[_Place, _Place]]) -> list[tuple[_Place, _Place]]:
    """Leave out blocks in which the student has nothing to train; the last pair stays, whatever it holds."""
    kept: list[tuple[_Place, _Place]] = []
    for pair in pairs:
        is_idle = pair[1].progress == (kept[-1][1].progress if kept else 0.0)
        if is_idle and pair is pairs[-1] and kept:
            kept[-1] = pair
        elif not is_idle or pair is pairs[-1]:
            kept.append(pair)
    return kept


def _align(teachers: list[_Place], students: list[_Place]) -> Iterator[tuple[_Place, _Place]]:
    """Find the order-preserving pairs of greatest worth."""

    @cache
    def best(first: int, second: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        if first == len(teachers) or second == len(students):
            return 0.0, ()
        options = [best(first + 1, second), best(first, second + 1)]
        worth = _worth(teachers[first], students[second])
        if worth > 0:
            rest, pairs = best(first + 1, second + 1)
            options.append((worth + rest, ((first, second), *pairs)))
        return max(options, key=lambda option: option[0])

    # From the back, so that recursion stays shallow.
    for first in reversed(range(len(teachers))):
        for second in reversed(range(len(students))):
            best(first, second)
    for first, second in best(0, 0)[1]:
        yield teachers[first], students[second]


def _worth(teacher: _Place, student: _Place) -> float:
    if teacher.resolution != student.resolution:
        return 0.0
    distance = _OFF_DIAGONAL * abs(teacher.progress - student.progress)
    if teacher.shape == student.shape:
        return _EQUAL - distance
    # Between stages an adapter at every layer would be more adapter than student.
    return _ADAPTED - distance if teacher.ends_stage and student.ends_stage else 0.0
