"""Several candidates for one place of a student, each trained from the same activations as a block of its own.

A block with candidates becomes as many blocks as it has candidates. All of them read one boundary of the teacher and
imitate the next, so between them travels a *fork*, which holds both::

    boundary 3 --T, candidate 0--> fork --candidate 1--> fork --candidate 2--> boundary 4

The teacher's block runs once, with the first candidate; its other blocks hand the fork on. Plans, relays and
checkpoints know nothing of candidates.

Source of the use: DNA (arXiv:1911.13053), *Block-wise supervision with distilled architecture knowledge*, and Puzzle
(arXiv:2411.19146), *Decoupled blockwise local distillation*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.block_view import BlockView, WholeBoundary
from lightning_pipebd.runtime.blocks import Partition, call_block, make_partition
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["Candidate", "Candidates", "expand_candidates", "target_of"]

_BOUNDARY, _NEXT = "fork_boundary", "fork_next_boundary"


class Candidates(nn.Module):
    """Several modules for one place of a model, of which the chosen one runs.

    In training each candidate learns to imitate the teacher's block by itself, whichever is chosen.

    Args:
        candidates: At least one module; all take and give the same shapes.
        chosen: Which one runs when the model runs; see :meth:`choose`.

    Attributes:
        candidates: The modules.
        num_candidates: How many there are, as a tensor.
        chosen: Index of the one that runs.

    Raises:
        ValueError: There are no candidates, or the chosen one does not exist.

    Example:
        >>> place = Candidates([nn.Linear(4, 4), nn.Identity()])
        >>> place.choose(1)
        >>> place(torch.ones(4))
        tensor([1., 1., 1., 1.])
    """

    chosen: int
    num_candidates: Tensor

    def __init__(self, candidates: Sequence[nn.Module], chosen: int = 0) -> None:
        super().__init__()
        if not candidates:
            raise ValueError(
                "`candidates` must have at least one module, but is empty. Give the modules to choose from."
            )
        self.candidates = nn.ModuleList(candidates)
        # In the state, so that a checkpoint alone tells which places have candidates, also such without parameters.
        self.register_buffer("num_candidates", torch.tensor(len(candidates)))
        self.choose(chosen)

    def choose(self, index: int) -> None:
        """Decide which candidate runs.

        Raises:
            ValueError: There is no such candidate.
        """
        if not 0 <= index < len(self.candidates):
            msg = f"`chosen` must be a candidate's number below {len(self.candidates)}, but is {index}."
            raise ValueError(msg)
        self.chosen = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the chosen candidate."""
        return self.candidates[self.chosen](*args, **kwargs)


class Candidate(NamedTuple):
    """Which candidate a block stands for.

    Args:
        place: Name of the block that has candidates.
        number: The candidate's number.
        num_candidates: How many there are.
    """

    place: str
    number: int
    num_candidates: int


def target_of(teacher_output: Any) -> Any:
    """Give what a student block imitates of what its teacher block put out: all of it, or a fork's next boundary.

    Example:
        >>> target_of({"fork_boundary": 1, "fork_next_boundary": 2}), target_of((3, 4))
        (2, (3, 4))
    """
    return teacher_output[_NEXT] if _is_fork(teacher_output) else teacher_output


def expand_candidates(
    models: tuple[nn.Module, nn.Module], teacher: Partition, student: Partition, names: Sequence[str]
) -> tuple[Partition, Partition, tuple[str, ...], tuple[Candidate | None, ...]]:
    """Make a block of every candidate.

    Args:
        models: The whole teacher and the whole student.
        teacher: The teacher's blocks.
        student: The student's blocks, of which some have candidates.
        names: Their names.

    Returns:
        The teacher's and the student's blocks, their names, and per block the candidate that it stands for.

    Raises:
        PartitionError: A block has parameters beside its candidates, or several places with candidates.
    """
    teachers: list[nn.Module] = []
    students: list[nn.Module] = []
    expanded: list[str] = []
    found: list[Candidate | None] = []
    for name, taught, learned in zip(names, teacher.blocks, student.blocks, strict=True):
        place = _find_place(name, learned)
        if place is None:
            teachers.append(taught)
            students.append(learned)
            expanded.append(name)
            found.append(None)
            continue
        count = len(place.candidates)
        students += [_CandidateBlock(learned, place, number) for number in range(count)]
        teachers += _fork(taught, count)
        expanded += [f"{name}[{number}]" for number in range(count)]
        found += [Candidate(name, number, count) for number in range(count)]
    if not any(found):
        return teacher, student, tuple(names), tuple(found)
    return (
        make_partition(models[0], tuple(teachers), teacher.tail),
        make_partition(models[1], tuple(students), student.tail),
        tuple(expanded),
        tuple(found),
    )


def _find_place(name: str, block: nn.Module) -> Candidates | None:
    places = [module for module in block.modules() if isinstance(module, Candidates)]
    if not places:
        return None
    own = {id(parameter) for parameter in places[0].parameters()}
    others = [path for path, parameter in block.named_parameters() if id(parameter) not in own]
    if len(places) > 1 or others:
        beside = f"parameter {others[0]}" if others else "other candidates"
        msg = (
            f"Block `{name}` must consist of its candidates alone, because they are trained apart, but has {beside} "
            "beside them. End a block before and after the module with candidates."
        )
        raise PartitionError(msg)
    return places[0]


def _fork(block: nn.Module, count: int) -> list[nn.Module]:
    if count == 1:
        return [block]
    return [_ForkingBlock(block), *(_ForkedBlock() for _ in range(count - 2)), _JoiningBlock()]


def _is_fork(tree: Any) -> bool:
    return type(tree) is dict and tree.keys() == {_BOUNDARY, _NEXT}


class _ForkingBlock(nn.Module):
    """The teacher's block with the first candidate: gives its own boundary and the next one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    @property
    def takes_whole(self) -> bool:
        """As the block does."""
        return isinstance(self.block, BlockView) and self.block.takes_whole

    @property
    def opened_modules(self) -> list[nn.Module]:
        """Containers that the block was cut from."""
        return self.block.opened_modules if isinstance(self.block, BlockView) else []

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Give the fork."""
        whole = len(args) == 1 and isinstance(args[0], WholeBoundary)
        boundary = args[0].value if whole else kwargs or (args[0] if len(args) == 1 else args)
        # On a copy, lest a block that works in place changes what the other candidates read.
        return {_BOUNDARY: boundary, _NEXT: call_block(self.block, pytree.tree_map_only(Tensor, torch.clone, boundary))}


class _ForkedBlock(nn.Module):
    """Beside candidates in the middle: hands the fork on."""

    def forward(self, **fork: Any) -> dict[str, Any]:
        """Give the fork."""
        return fork


class _JoiningBlock(nn.Module):
    """Beside the last candidate: the next boundary alone goes on."""

    def forward(self, **fork: Any) -> Any:
        """Give the next boundary."""
        return fork[_NEXT]


class _CandidateBlock(nn.Module):
    """The student's block with one candidate; its parameters are the candidate's."""

    def __init__(self, block: nn.Module, place: Candidates, number: int) -> None:
        super().__init__()
        self.candidate = place.candidates[number]
        # Past nn.Module's bookkeeping on purpose: the other candidates are no part of this block.
        self.__dict__["_block"] = block
        self.__dict__["_place"] = place
        self._number = number

    @property
    def takes_whole(self) -> bool:
        """As the block does; what a fork holds is handed to the block itself."""
        block = self.__dict__["_block"]
        return not self._number and isinstance(block, BlockView) and block.takes_whole

    @property
    def opened_modules(self) -> list[nn.Module]:
        """Modules that run beside the candidate, and decide for `train()` or `eval()`."""
        block = self.__dict__["_block"]
        return [*(block.opened_modules if isinstance(block, BlockView) else ()), *block.modules()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with this candidate."""
        with self._chosen():
            if self._number:
                return call_block(self.__dict__["_block"], kwargs[_BOUNDARY])
            return self.__dict__["_block"](*args, **kwargs)

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        place = self.__dict__["_place"]
        before = place.chosen
        place.chosen = self._number
        try:
            yield
        finally:
            place.chosen = before
