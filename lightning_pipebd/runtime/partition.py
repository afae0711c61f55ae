"""Divides a model into blocks: at named modules of an unchanged model, or as a list of blocks.

This is the module to import from; the files it stands on are

::

    tracing -> recording -> cutting -> partition      what the model does; cut; blocks
    block_view, blocks, listed_blocks                 how blocks run, copy, pickle; blocks that are listed
    block_map, boundary_shapes, block_traits          what is checked and asked before training
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_pipebd.runtime.block_map import check_block_map, check_ties, resolve_paths
from lightning_pipebd.runtime.block_traits import has_batch_statistics, is_stochastic
from lightning_pipebd.runtime.block_view import BlockView
from lightning_pipebd.runtime.blocks import CallableBlock, Partition, UncutTail, call_block, make_partition
from lightning_pipebd.runtime.boundary_shapes import boundary_shapes, check_shapes
from lightning_pipebd.runtime.cutting import Piece, cut_recording
from lightning_pipebd.runtime.listed_blocks import explicit_blocks
from lightning_pipebd.runtime.recording import record
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = [
    "BlockView",
    "CallableBlock",
    "Partition",
    "PartitionError",
    "boundary_shapes",
    "call_block",
    "check_block_map",
    "check_shapes",
    "check_ties",
    "cut_model",
    "explicit_blocks",
    "has_batch_statistics",
    "is_stochastic",
]


def cut_model(model: nn.Module, boundaries: Sequence[str], *, role: str = "student") -> Partition:
    """Divide an unchanged model into blocks, each ending right after a named module's last call.

    Code between modules runs exactly once, in the block after the boundary. Modules, parameters and buffers stay the
    model's, so a block sees whatever happens to the model. Where containers that hold a boundary compute something
    else in ``train()`` than in ``eval()``, a block follows their mode.

    Args:
        model: The model; it is not changed. Only its ``forward``'s arguments without a default are inputs.
        boundaries: Module paths in the order in which the model reaches them. The empty path is the model itself: as
            the last boundary it stands for the model's output.
        role: ``"teacher"`` or ``"student"``, for messages. A teacher always runs in ``eval()``, so it need only be
            possible to cut it in that mode.

    Raises:
        PartitionError: A path is unknown, twice there, never reached or out of order; a value passes a boundary aside
            of it; a container that holds a boundary cannot be opened. The message says where, and the way out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> partition = cut_model(model, ["0", "2"])
        >>> partition.parameter_names
        (('0.weight', '0.bias'), ('2.weight', '2.bias'))
        >>> partition.tail is None
        True
    """
    paths = resolve_paths(model, boundaries, role)
    if paths == [""]:
        return make_partition(model, (model,), None)
    evaluation = record(model, paths, role=role, training=False)
    pieces, end = cut_recording(evaluation, paths, role)
    training_pieces: Sequence[Piece | None]
    try:
        training_pieces, training_end = cut_recording(record(model, paths, role=role, training=True), paths, role)
        ends = [end, training_end]
    except PartitionError:
        if role != "teacher":
            raise
        training_pieces, ends = [None] * len(pieces), [end]
    owners = _find_owners(model, [pieces, [piece for piece in training_pieces if piece is not None]])
    blocks = tuple(
        _make_view(model, f"block {index} of the {role}", evaluation.opened, piece, training_piece, owners, index)
        for index, (piece, training_piece) in enumerate(zip(pieces, training_pieces, strict=True))
    )
    return make_partition(model, blocks, _make_tail(model, f"the end of the {role}", evaluation.opened, ends))


def _find_owners(model: nn.Module, pieces_of_modes: Sequence[Sequence[Piece]]) -> dict[str, int]:
    """Give the buffers that several blocks only read, because no module that runs holds them, and their first block."""
    readers: dict[str, set[int]] = {}
    for pieces in pieces_of_modes:
        for index, piece in enumerate(pieces):
            for path in piece.attributes:
                readers.setdefault(path, set()).add(index)
    modules = dict(model.named_modules())
    called = {path for pieces in pieces_of_modes for piece in pieces for path in piece.modules}
    held = {id(buffer) for path in called | (readers.keys() & modules.keys()) for buffer in modules[path].buffers()}
    buffers = {name for name, buffer in model.named_buffers() if id(buffer) not in held}
    return {path: min(blocks) for path, blocks in readers.items() if len(blocks) > 1 and path in buffers}


def _make_tail(
    model: nn.Module, subject: str, opened: tuple[str, ...], ends: Sequence[Piece | PartitionError | None]
) -> nn.Module | None:
    """Make what follows the last boundary; ``ends`` has an entry for each mode the model was cut for."""
    for end in ends:
        if isinstance(end, PartitionError):
            return UncutTail(str(end))
    pieces = [end for end in ends if isinstance(end, Piece)]
    if not pieces:
        return None
    if len(pieces) < len(ends):
        return UncutTail(
            f"{subject} must be the same in `train()` and in `eval()`, but there is one in one of them only."
        )
    return _make_view(model, subject, opened, pieces[0], pieces[1] if len(pieces) > 1 else None)


def _make_view(
    model: nn.Module,
    subject: str,
    opened: tuple[str, ...],
    evaluation: Piece,
    training: Piece | None,
    owners: Mapping[str, int] | None = None,
    number: int = 0,
) -> BlockView:
    pieces = [evaluation] if training is None else [evaluation, training]
    attributes = frozenset(path for piece in pieces for path in piece.attributes)
    # A module may also be handed to a function as it is.
    handed = attributes & {path for path, _ in model.named_modules()}
    training_code = None if training is None else training.code
    if training_code is not None and training_code.is_same(evaluation.code):
        training_code = evaluation.code
    shared = {path: owner for path, owner in (owners or {}).items() if path in attributes}
    return BlockView(
        model,
        subject=subject,
        module_paths=tuple(handed.union(*(piece.modules for piece in pieces))),
        tensor_paths=tuple(attributes - handed),
        opened=opened,
        evaluation_code=evaluation.code,
        training_code=training_code,
        draws=any(piece.draws for piece in pieces),
        shared=tuple(sorted(shared)),
        borrowed=frozenset(path for path, owner in shared.items() if owner < number),
    )
