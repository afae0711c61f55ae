"""What teacher blocks one batch ahead rely on, and how it is noticed that somebody does not leave it alone.

Between the moment at which something is made of the next batch and the step that learns from it, in one process user
code would have had its turn: it may have meant to change the batch, the teacher, or what batch hooks read. Nothing here
asks a GPU: tensors count in host memory how often they were changed in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_pipebd.block_jobs import BlockJobs
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.lightning_internals.module import StagedBatchModule
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.runtime.executor import LEAVE_OUT

__all__ = ["HookWatch", "Seen", "WatchedJobs", "check_may_teach_ahead", "see_batch"]

_MOST_ITEMS = 256
_CONTAINERS = (dict, list, set, tuple, deque)
_COUNTED = (Tensor, *_CONTAINERS)
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "unpack_batch")
#: What torch keeps in every module beside its tensors and submodules: tables of hooks, mostly.
_TORCH_KEEPS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
_MODELS = ("teacher", "student", "adapters")


def check_may_teach_ahead(module: BlockwiseDistillationModule) -> None:
    """Raise for a teacher that changes with every batch, or whose modules tell of their calls.

    Raises:
        ValueError: Each teacher block follows its student block, or a module of the teacher has a forward hook that is
            not torch's own.
    """
    if module.block_momentum is not None:
        raise ValueError(
            "`momentum` must be left out where the teacher works one batch ahead, because the next batch is the next "
            f"teacher's. Leave it out, or {LEAVE_OUT}."
        )
    blocks = module.block_pairs.teacher.blocks
    # Blocks that are cut out of a container do not call its hooks.
    opened = {id(inner) for block in blocks for inner in getattr(block, "opened_modules", ())}
    for name, inner in _named_modules(module.teacher, blocks):
        hooks = [*inner._forward_pre_hooks.values(), *inner._forward_hooks.values()]
        if id(inner) not in opened and not all(map(_is_of_torch, hooks)):
            where = f"teacher.{name}" if name else "teacher"
            raise ValueError(
                "`teacher` must have no forward hooks where it works one batch ahead, because they would be called "
                f"for the next batch while the present one is trained, but `{where}` ({type(inner).__name__}) has one. "
                f"Remove it, or {LEAVE_OUT}."
            )


def _named_modules(teacher: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    memo: set[nn.Module] = set()
    yield from teacher.named_modules(memo)
    for block in blocks:
        yield from block.named_modules(memo)


def _is_of_torch(hook: Any) -> bool:
    # Weight and spectral norms, pruning and lazy modules compute weights there, and keep nothing of a batch.
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"


class Seen:
    """Some values as they were at one moment: which they are, and how often tensors among them were changed in place.

    Of containers also how long they are. Tensors of inference mode do not count their changes.

    Args:
        values: The values; they are kept alive, so that no other can take one's identity.
    """

    __slots__ = ("_counts", "_values")

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = list(values)
        self._counts = [_count(value) for value in self._values if isinstance(value, _COUNTED)]

    def is_same(self, other: Seen) -> bool:
        """Tell whether the other has the very same values, and none was changed between the two."""
        mine, theirs = self._values, other._values
        return len(mine) == len(theirs) and self._counts == other._counts and all(map(is_, mine, theirs))


def _count(value: Any) -> int:
    if isinstance(value, Tensor):
        return -1 if value.is_inference() else value._version
    return len(value)


def see_batch(batch: Any) -> Seen:
    """See what a batch consists of, as far as tuples, lists and dictionaries show it."""
    return Seen(pytree.tree_leaves(batch, is_leaf=lambda node: not isinstance(node, (tuple, list, dict))))


class WatchedJobs(BlockJobs):
    """Jobs that know what of the teacher their boundaries were made with."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        self._seen: dict[int, Seen] = {}

    @override
    def teach(self, block: int, boundary: Any) -> Any:
        """Give the next boundary."""
        output = super().teach(block, boundary)
        # Afterwards: what a block changes itself, such as a buffer that it counts in, is in the order of one process.
        self._seen[block] = self._see(block)
        return output

    def check_teacher(self) -> None:
        """Raise if somebody has changed a teacher block of this rank since it taught last.

        Raises:
            RuntimeError: A parameter or buffer was changed in place, or is another one.
        """
        for block, seen in self._seen.items():
            if not seen.is_same(self._see(block)):
                name = self._module.block_pairs.names[block]
                raise RuntimeError(
                    f"The teacher of block {block} (`{name}`) must stay as it was when it worked on this batch, a step "
                    "early, until that is trained, but its parameters or buffers were changed since then. Change no "
                    f"teacher in hooks and callbacks, or {LEAVE_OUT}."
                )

    def _see(self, block: int) -> Seen:
        if block not in self._places:
            self._places[block] = list(self._find_places(block))
        return Seen(table.get(name) for table, name in self._places[block])

    def _find_places(self, block: int) -> Iterator[tuple[dict[str, Any], str]]:
        """Find where the modules keep a teacher block's parameters and buffers."""
        pairs = self._module.block_pairs
        partition = pairs.teacher
        borrowed = getattr(partition.blocks[block], "borrowed_buffers", ())
        for path in (*partition.parameter_names[block], *partition.buffer_names[block], *borrowed):
            owner, _, name = path.rpartition(".")
            holder = pairs.teacher_model.get_submodule(owner)
            yield (holder._parameters if name in holder._parameters else holder._buffers), name


class HookWatch:
    """Notices what batch hooks and ``unpack_batch`` leave behind, where other code may find it.

    It looks at the attributes of the module, of its submodules beside teacher, student and adapters, and of the data
    module: at which objects they are, at the items of containers, and at changes of tensors in place. What else is
    changed inside an object, or elsewhere, it does not see.

    Args:
        module: Has the hooks.
        datamodule: May have hooks, too.
    """

    def __init__(self, module: BlockwiseDistillationModule, datamodule: Any = None) -> None:
        self._holders: list[tuple[str, object]] = []
        if _has_batch_hooks(module) or _has_batch_hooks(datamodule):
            self._holders = [("self", module), *([("datamodule", datamodule)] if datamodule is not None else [])]
            for name, child in module.named_children():
                if name not in _MODELS:
                    self._holders += [(f"self.{path}", inner) for path, inner in child.named_modules(prefix=name)]

    def look(self) -> list[dict[str, Any]]:
        """See all attributes, of one holder after the other."""
        return [
            {name: _see(value) for name, value in vars(holder).items() if name not in _TORCH_KEEPS}
            for _, holder in self._holders
        ]

    def changes_since(self, before: list[dict[str, Any]]) -> list[str]:
        """Name the attributes that are new, gone or changed."""
        return sorted(
            f"{place}.{name}"
            for (place, _), then, now in zip(self._holders, before, self.look(), strict=True)
            for name in then.keys() | now.keys()
            if name not in then or name not in now or not _is_same(then[name], now[name])
        )


def _has_batch_hooks(holder: object) -> bool:
    """Tell whether a module or data module has batch hooks of the user's."""
    own = (LightningModule, LightningDataModule, StagedBatchModule, DistillationModule)
    kept = {getattr(kind, name, None) for kind in own for name in _BATCH_HOOKS}
    found = (getattr(holder, name, None) for name in _BATCH_HOOKS)
    return any(hook is not None and getattr(hook, "__func__", hook) not in kept for hook in found)


def _see(value: Any) -> Any:
    """Give a value itself, if nothing can be changed in it that would be seen: most attributes are such."""
    if not isinstance(value, _COUNTED):
        return value
    # Of a long container its length must do: to look at every item would take longer than to unpack a batch.
    if isinstance(value, Tensor) or len(value) > _MOST_ITEMS:
        return Seen([value])
    return Seen([value, *value, *value.values()] if isinstance(value, dict) else [value, *value])


def _is_same(then: Any, now: Any) -> bool:
    return then is now or (isinstance(then, Seen) and isinstance(now, Seen) and then.is_same(now))
