"""What one rank of an end-to-end training holds of one step: pieces of the batch, graphs, gradients, the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineProgram, Stream
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.row_trees import RowTree, take_rows

__all__ = ["BlockGraph", "StepState", "begin_graph", "gradient_of"]


class BlockGraph:
    """One block's graph for one micro-batch, from the leaves of its input to those of its output."""

    def __init__(self, leaves: list[Any], outputs: list[Any]) -> None:
        self.leaves = leaves
        self.outputs = outputs
        self.gradients: list[Any] = []

    def take(self, gradients: Sequence[Any]) -> None:
        """Take the gradients of the outputs; what does not depend on anything trained has none."""
        pairs = [
            (output, gradient)
            for output, gradient in zip(self.outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        self.outputs, self.gradients = [output for output, _ in pairs], [gradient for _, gradient in pairs]

    def backward(self) -> None:
        """Add up the gradients of everything below, and end the graph."""
        if self.outputs:
            torch.autograd.backward(self.outputs, self.gradients)

    def backward_to(self, inputs: Sequence[Tensor], *, keep: bool = False) -> None:
        """Add up the gradients of these tensors only."""
        if self.outputs and inputs:
            torch.autograd.backward(self.outputs, self.gradients, inputs=list(inputs), retain_graph=keep)


class StepState:
    """What one rank holds of one step.

    Args:
        step: Number of the step.
        program: This rank's program.
        loaded: What was loaded of the batch.
        ahead: What was loaded of the next one.
    """

    def __init__(
        self, step: int, program: PipelineProgram, loaded: dict[Stream, RowTree], ahead: dict[Stream, RowTree]
    ) -> None:
        self.step = step
        self.program = program
        self.has_update = any(action.follows_update for action in program.actions)
        self.loaded = {(stream, False): piece for stream, piece in loaded.items()}
        self.loaded |= {(stream, True): piece for stream, piece in ahead.items()}
        self.received_ahead: dict[Stream, RowTree] = {}
        self.pieces: defaultdict[tuple[Stream, int, bool], list[RowTree]] = defaultdict(list)
        self.graphs: dict[tuple[int, Rows], BlockGraph] = {}
        self.gradients: dict[tuple[int, Rows], list[Any]] = {}
        self.terms: dict[str, Tensor] = {}

    def cut_inputs(self, action: PipelineAction) -> tuple[list[Any], list[tuple[int, int]]]:
        """Give a replica's rows of what was loaded: trees, and which of them each stream is."""
        pieces = {stream: piece for (stream, is_next), piece in self.loaded.items() if is_next == action.is_next}
        # The teacher mostly sees what the student sees, which need not travel twice.
        different = {id(piece.tree): piece for piece in pieces.values()}
        places = {tree: place for place, tree in enumerate(different)}
        cut = (take_rows(piece, action.rows) for piece in different.values())
        trees = [(piece.tree, piece.row_leaves) for piece in cut]
        return trees, [(int(stream), places[id(piece.tree)]) for stream, piece in pieces.items()]

    def load(self, action: PipelineAction, inputs: tuple[list[Any], list[tuple[int, int]]]) -> None:
        """Take in what :meth:`cut_inputs` gave on the rank that loads."""
        for stream, place in inputs[1]:
            self.loaded[Stream(stream), action.is_next] = piece = RowTree(action.rows, *inputs[0][place])
            # The teacher is done with its input in this step; the student is yet to see the batch.
            if action.is_next and stream != Stream.BOUNDARY:
                self.received_ahead[Stream(stream)] = piece

    def put(self, stream: Stream, index: int, piece: RowTree, is_next: bool = False) -> None:
        """Keep what was received or computed."""
        self.pieces[stream, index, is_next].append(piece)

    def take(self, action: PipelineAction) -> RowTree:
        """Give the piece that an action uses; what was not loaded here is used once and then gone."""
        whole = self.loaded.get((action.stream, action.is_next)) if action.index == 0 else None
        if whole is not None:
            return take_rows(whole, action.rows)
        pieces = self.pieces[action.stream, action.index, action.is_next]
        return pieces.pop(next(place for place, piece in enumerate(pieces) if piece.rows == action.rows))

    def take_all(self, stream: Stream, index: int, rows: Rows) -> list[RowTree]:
        """Give all pieces that lie in some rows of the batch, in the order of rows."""
        whole = self.loaded.get((stream, False)) if index == 0 else None
        if whole is not None:
            return [take_rows(whole, rows)]
        pieces = self.pieces[stream, index, False]
        taken = sorted((piece for piece in pieces if rows.contains(piece.rows)), key=lambda piece: piece.rows)
        self.pieces[stream, index, False] = [piece for piece in pieces if piece not in taken]
        return taken


def begin_graph(tree: Any) -> tuple[Any, list[Any]]:
    """Make leaves of a tree's tensors, which want a gradient where the originals do."""
    if isinstance(tree, Tensor):
        leaf = tree.detach().requires_grad_(tree.requires_grad)
        return leaf, [leaf]
    leaves, form = pytree.tree_flatten(tree)
    leaves = [leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(leaves, form), leaves


def gradient_of(leaf: Any) -> Tensor | None:
    """Give the gradient of a graph's leaf; none of what is no tensor."""
    return leaf.grad if isinstance(leaf, Tensor) else None
