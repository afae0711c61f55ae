"""Cuts a recording at its boundaries into one piece per block and one for what follows the last boundary."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import fx
from torch.fx.node import map_arg

from lightning_pipebd.runtime.block_traits import graph_draws_random_numbers
from lightning_pipebd.runtime.block_view import BlockCode
from lightning_pipebd.runtime.recording import Recording
from lightning_pipebd.runtime.tracing import BoundaryEnd, PartitionError, name_module, way_out

__all__ = ["Piece", "cut_recording"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One block's operations in one mode, and the names of what it uses in the model."""

    code: BlockCode
    modules: frozenset[str]
    attributes: frozenset[str]
    draws: bool


def cut_recording(
    recording: Recording, boundaries: Sequence[str], role: str
) -> tuple[list[Piece], Piece | PartitionError | None]:
    """Cut a recording after each boundary.

    Args:
        recording: The model's operations.
        boundaries: Paths in the order of the blocks.
        role: ``"teacher"`` or ``"student"``, for messages.

    Returns:
        One piece per boundary, and the end: what the model does after the last boundary, ``None`` if that is nothing,
        or why the last boundary is not all it needs. Every operation is in exactly one piece, in the model's order.

    Raises:
        PartitionError: Boundaries are never reached, out of order or the same; a value passes a boundary aside of it.
    """
    ends = _order_ends(recording, boundaries, role)
    cutter = _Cutter(recording, boundaries, ends, role)
    pieces = [cutter.cut(index) for index in range(len(ends))]
    if not cutter.nodes_of(len(ends)) and ends[-1].value == recording.ends[""].value:
        return pieces, None
    try:
        return pieces, cutter.cut(len(ends))
    except PartitionError as error:
        # No block's concern: a student's encoder may well be trained alone, whatever its decoder takes from it.
        return pieces, error


def _order_ends(recording: Recording, boundaries: Sequence[str], role: str) -> list[BoundaryEnd]:
    ends: list[BoundaryEnd] = []
    for index, path in enumerate(boundaries):
        if path not in recording.ends:
            msg = (
                f"{name_module(path, role)} must be called in the model's `forward` to end a block, but never is. "
                f"{_name_called(recording, path)} {way_out(role, also=True)}"
            )
            raise PartitionError(msg)
        end = recording.ends[path]
        if index and end.position < ends[-1].position:
            msg = (
                f"{name_module(path, role)} must run after {name_module(boundaries[index - 1], role)}, the boundary "
                "before it, but runs earlier. Order the boundaries as the model reaches them."
            )
            raise PartitionError(msg)
        ends.append(end)
    return ends


class _Cutter:
    """Copies the operations of one block after another into graphs of their own."""

    def __init__(self, recording: Recording, boundaries: Sequence[str], ends: Sequence[BoundaryEnd], role: str) -> None:
        self._recording = recording
        self._boundaries = boundaries
        self._ends = ends
        self._role = role
        nodes = list(recording.graph.nodes)[:-1]
        positions = [end.position for end in ends]
        self._homes = {node: bisect_right(positions, index) for index, node in enumerate(nodes)}
        self._needed = _find_needed(nodes, [*(end.value for end in ends), recording.ends[""].value])

    def nodes_of(self, index: int) -> list[fx.Node]:
        """Give the operations of a block, without reading parameters, which every block does for itself."""
        return [
            node
            for node, home in self._homes.items()
            if home == index and node in self._needed and node.op not in ("get_attr", "placeholder")
        ]

    def cut(self, index: int) -> Piece:
        nodes = self.nodes_of(index)
        end = self._ends[index] if index < len(self._ends) else self._recording.ends[""]
        if index < len(self._ends) and not nodes:
            msg = (
                f"{self._subject(index)} must do something, but nothing happens between its boundary "
                f"{name_module(self._boundaries[index], self._role)} and the one before it. Leave one of them out."
            )
            raise PartitionError(msg)
        graph = fx.Graph()
        environment: dict[fx.Node, fx.Node] = {}
        inputs, takes_whole = self._add_inputs(index, graph, environment)
        reads = self._add_reads(index, graph, environment, [*nodes, *_nodes_in(end.value)])
        for node in nodes:
            environment[node] = graph.node_copy(node, environment.__getitem__)
        graph.output(map_arg(end.value, environment.__getitem__))
        return Piece(
            code=BlockCode(
                graph,
                inputs,
                {name: self._recording.constants[name] for name in sorted(reads & self._recording.constants.keys())},
                takes_whole=takes_whole,
                takes_items=takes_whole and _is_read_by_item(next(iter(graph.nodes))),
            ),
            modules=frozenset(str(node.target) for node in nodes if node.op == "call_module"),
            attributes=frozenset(reads - self._recording.constants.keys()),
            draws=graph_draws_random_numbers(graph),
        )

    def _add_inputs(
        self, index: int, graph: fx.Graph, environment: dict[fx.Node, fx.Node]
    ) -> tuple[tuple[str, ...], bool]:
        """Make placeholders of what passes the boundary before a block."""
        if index == 0:
            values = {str(node.target): node for node in self._homes if node.op == "placeholder"}
        else:
            value = self._ends[index - 1].value
            if isinstance(value, fx.Node):
                values = {"boundary": value}
            elif isinstance(value, tuple) and all(isinstance(item, fx.Node) for item in value):
                values = {f"boundary_{position}": item for position, item in enumerate(value)}
            elif isinstance(value, dict) and all(_is_item(key, item) for key, item in value.items()):
                values = value
            else:
                msg = (
                    f"{name_module(self._boundaries[index - 1], self._role)} must return a tensor, a tuple of tensors, "
                    "or a dict of tensors whose keys are names, to end a block, but returns "
                    f"{_describe_tree(value)}. "
                    f"Choose a module inside or after it. {way_out(self._role, also=True)}"
                )
                raise PartitionError(msg)
        for name, node in values.items():
            environment[node] = graph.placeholder(name)
        return tuple(values), index > 0 and isinstance(self._ends[index - 1].value, fx.Node)

    def _add_reads(
        self, index: int, graph: fx.Graph, environment: dict[fx.Node, fx.Node], users: Sequence[fx.Node]
    ) -> set[str]:
        """Repeat reads of parameters, buffers and constants, and refuse values from other blocks."""
        reads: set[str] = set()
        own = {node for node in users if self._homes[node] == index and node.op != "get_attr"}
        for user in users:
            for node in user.all_input_nodes if user in own else [user]:
                if node in environment or node in own:
                    continue
                if node.op != "get_attr":
                    raise self._crossing(index, node, user)
                name = str(node.target)
                reads.add(name)
                is_constant = name in self._recording.constants
                environment[node] = graph.placeholder(name) if is_constant else graph.node_copy(node)
        return reads

    def _crossing(self, index: int, node: fx.Node, user: fx.Node) -> PartitionError:
        boundary = self._boundaries[index - 1] if index else ""
        used = f"used by {_describe(user)}" if user is not node else "which is what the boundary holds"
        return PartitionError(
            f"{self._subject(index)} must use nothing from before it but its boundary `{boundary}`, but also needs "
            f"{_describe(node)}, {used}. {self._advise(index, node, user)} {way_out(self._role, also=True)}"
        )

    def _advise(self, index: int, node: fx.Node, user: fx.Node) -> str:
        """Say which boundaries a value that passes them allows."""
        last = len(self._ends) - 1
        if index == last and (path := self._find_last_module(index, user)) is not None:
            return f"Nothing is trained from there on: end the block map at `{path}`."
        home = self._homes[node]
        uses = [index, *(self._homes.get(other, last) for other in node.users)]
        # A boundary that holds the value serves all that comes after it, up to the next one.
        holders = [number for number in range(home, last + 1) if node in _nodes_in(self._ends[number].value)]
        start = max([home, *(number + 1 for number in holders if number < index)])
        stop = min([max(uses), *(number for number in holders if number >= index), last])
        passed = self._boundaries[start:stop]
        outside = "a boundary outside the residual block or skip connection"
        if not passed or len(passed) == last:
            return f"Choose {outside}."
        return f"Leave out {', '.join(f'`{path}`' for path in passed)}, or choose {outside}."

    def _find_last_module(self, index: int, user: fx.Node) -> str | None:
        """Give the module that may end a block before ``user``, if no module is called from there on."""
        nodes = self.nodes_of(index)
        called = [node for node in nodes if node.op == "call_module"]
        if not called or user not in nodes or nodes.index(called[-1]) >= nodes.index(user):
            return None
        allowed = {*nodes, *_nodes_in(self._ends[index - 1].value)} if index else set(self._homes)
        before = nodes[: nodes.index(called[-1]) + 1]
        needs = {other for node in before for other in node.all_input_nodes if other.op != "get_attr"}
        return str(called[-1].target) if needs <= allowed else None

    def _subject(self, index: int) -> str:
        return f"block {index} of the {self._role}" if index < len(self._ends) else f"the end of the {self._role}"


def _name_called(recording: Recording, path: str) -> str:
    """Say which module inside one that is never called is the last that is."""
    inside = [str(node.target) for node in recording.graph.nodes if str(node.target).startswith(f"{path}.")]
    return f"Take the last one inside it that is called, `{inside[-1]}`." if inside else "Choose a module that is."


def _find_needed(nodes: Sequence[fx.Node], values: Sequence[Any]) -> set[fx.Node]:
    """Find what has to run: all operations, except reads of shapes, items and attributes that nobody uses."""
    needed = {node for value in values for node in _nodes_in(value)}
    for node in reversed(nodes):
        reads_only = node.op == "call_function" and node.target in (getattr, operator.getitem)
        if not reads_only or any(user in needed for user in node.users):
            needed.add(node)
    return needed


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(value, found.append)
    return found


def _is_item(key: Any, item: Any) -> TypeGuard[fx.Node]:
    return isinstance(key, str) and key.isidentifier() and isinstance(item, fx.Node)


def _is_read_by_item(node: fx.Node) -> bool:
    items = [user.target is operator.getitem and isinstance(user.args[1], (int, str)) for user in node.users]
    return bool(items) and all(items)


def _describe(node: fx.Node) -> str:
    """Say in the model's words what a node is."""
    if node.op == "placeholder":
        return f"the model's input `{node.target}`"
    if node.op == "call_module":
        return f"the output of `{node.target}`"
    if node.op == "output":
        return "the model's output"
    origin = f" of {_describe(node.args[0])}" if node.args and isinstance(node.args[0], fx.Node) else ""
    if node.target in (getattr, operator.getitem):
        return f"`{node.args[1]}`{origin}"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"`{name}`{origin}"


def _describe_tree(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, value))}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)} with something else in it"
    return "a list" if isinstance(value, list) else repr(value)
