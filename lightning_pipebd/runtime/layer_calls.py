"""How a model calls one of its layers, and the layer called so with the tensors of a boundary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["HIDDEN", "LastLayerReached", "LayerCall", "containers", "pack", "until_last_layer"]

HIDDEN = "hidden"
"""Name of the hidden state in a boundary."""

_SAME_ARGUMENTS = (
    "Let the layers of teacher and student take the same arguments (for attention: the same implementation)."
)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How a model calls one of its layers.

    Attributes:
        subject: What messages call the layer.
        spec: Form of arguments and keyword arguments.
        leaves: Per leaf the name of the tensor that goes there, or the value itself.
        dtypes: Per leaf the tensor's type; ``None`` where a value goes.
        parts: Per part of its output the name of the tensor that it is, or ``None``; empty if the hidden state is the
            output.
    """

    subject: str
    spec: Any
    leaves: tuple[Any, ...]
    dtypes: tuple[torch.dtype | None, ...]
    parts: tuple[str | None, ...]

    @property
    def names(self) -> list[str]:
        """Names of the tensors that the layer gets."""
        return [leaf for leaf, dtype in zip(self.leaves, self.dtypes, strict=True) if dtype is not None]

    def run(self, layer: nn.Module, hidden: Tensor, passengers: Mapping[str, Any]) -> Tensor:
        """Call the layer; give its hidden state.

        Raises:
            PartitionError: The boundary has not what the layer gets.
        """
        known = {HIDDEN: hidden, **passengers}
        for name, dtype in zip(self.leaves, self.dtypes, strict=True):
            if dtype is not None:
                self._check_given(name, dtype, known)
        leaves = [leaf if dtype is None else known[leaf] for leaf, dtype in zip(self.leaves, self.dtypes, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        output = layer(*args, **kwargs)
        found: Tensor = output[self.parts.index(HIDDEN)] if self.parts else output
        return found

    def _check_given(self, name: str, dtype: torch.dtype, known: Mapping[str, Tensor]) -> None:
        if name not in known:
            raise PartitionError(
                f"{self.subject} must get `{name}` from its boundary, which has {', '.join(known)}. {_SAME_ARGUMENTS}"
            )
        # Added to attention's scores, as it would be here, a mask of truth values does nothing.
        if dtype.is_floating_point and known[name].dtype is torch.bool:
            raise PartitionError(
                f"{self.subject} must get `{name}` of type {dtype}, but its boundary has one of truth values. "
                f"{_SAME_ARGUMENTS}"
            )

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Give the tensors of a call by name; those that the model leaves out are not among them.

        Raises:
            PartitionError: The call has another form than the example's.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        same = spec == self.spec and all(
            isinstance(leaf, Tensor) or leaf is None
            if dtype is not None
            else not isinstance(leaf, Tensor) and leaf == known
            for leaf, known, dtype in zip(leaves, self.leaves, self.dtypes, strict=True)
        )
        if not same:
            raise PartitionError(
                f"{self.subject} must be called as it was for the example of `layer_blocks`, but an argument is "
                "another number, or a tensor where there was none. Give an example like the batches, as long as they "
                "are, and a mask in every batch or in none (under `compile`, in every batch)."
            )
        triples = zip(leaves, self.leaves, self.dtypes, strict=True)
        return {name: leaf for leaf, name, dtype in triples if dtype is not None and leaf is not None}


def pack(parts: Sequence[str | None], known: Mapping[str, Any]) -> Any:
    """Give an output of a layer, made of the tensors that are known.

    Example:
        >>> pack(("hidden", None, "bias"), {"hidden": 3}), pack((), {"hidden": 3})
        ((3, None, None), 3)
    """
    return tuple(known.get(part) if part else None for part in parts) if parts else known[HIDDEN]


class LastLayerReached(BaseException):  # nothing that a model may catch
    """Leaves a model's ``forward`` at its last layer."""


def containers(model: nn.Module, path: str) -> list[nn.Module]:
    """Give the modules around the layers, from the model inwards."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]


@contextmanager
def until_last_layer() -> Iterator[None]:
    """Run a model inside the context no further than to its last layer."""
    try:
        yield
    except LastLayerReached:
        return
