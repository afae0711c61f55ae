"""Blocks of models that call a list of layers one after another, but whose ``forward`` no recording can follow.

::

    model.forward    embeddings, masks, tables   layer 0   layer 1   ...   layer n-1   norm, head
    blocks           [------------- 0 -----------------]   [- 1 -]   ...   [- n-1 -]   [- tail -]

Block 0 runs the model's own ``forward``, up to what it hands to the last layer; the layers after the first only note
how they are called. The boundary is a dictionary: the hidden state, and beside it all other tensors that any later
layer gets (masks, rotary tables), which pass through the blocks unchanged. It has the same form for every batch: masks
that the model leaves out where nothing is padded are there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.layer_calls import (
    HIDDEN,
    LastLayerReached,
    LayerCall,
    containers,
    pack,
    until_last_layer,
)
from lightning_pipebd.runtime.layer_masks import PADDINGS, PaddedInputs, find_masks, with_padded_rows
from lightning_pipebd.runtime.layer_tail import TailStep, make_tail
from lightning_pipebd.runtime.layer_watch import LayerStack, watch_layers
from lightning_pipebd.runtime.side_effects import preserved_modes, preserved_random_states
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["FirstBlock", "LayerBlock", "layer_blocks"]


def layer_blocks(model: nn.Module, layers: str, example: Any, *, tail: Sequence[TailStep] = ()) -> list[nn.Module]:
    """Give a model's layers as blocks, for ``teacher_blocks`` and ``student_blocks``.

    For models whose ``forward`` cannot be cut at module paths, such as those of Hugging Face. A boundary is a
    dictionary of the hidden state and of the other tensors that layers get. The last layer gives the hidden state only.

    Args:
        model: The model; run on the example in evaluation mode and without gradient, up to its last layer or tail, and
            where it hands masks to its layers also with padding.
        layers: Path of the ``nn.ModuleList`` whose modules the model calls one after another, each on what the one
            before it gave. At least two.
        example: An input of the model: a tensor, a tuple of arguments or a dictionary of keyword arguments. Later
            batches must be of the same form; their shapes are free.
        tail: What follows the last layer, each on what the one before it gave: paths of modules, such as the last norm
            and the head, and functions for what the model does between them. They make one more block.

    Returns:
        One block per layer, the first with all that comes before it, and one for the tail if there is one.

    Raises:
        PartitionError: There is no such path, or layers or tail are not called so; the message names the module.
        TypeError: What stands in the tail is neither a path nor a function.

    Example:
        >>> import torch
        >>> class Decoder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(7, 4)
        ...         self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...         self.head = nn.Linear(4, 7)
        ...
        ...     def forward(self, tokens=None, labels=None):
        ...         hidden = self.embed(tokens)
        ...         for layer in self.layers:
        ...             hidden = layer(hidden)
        ...         return self.head(hidden)
        >>> model, tokens = Decoder(), torch.tensor([[1, 2]])
        >>> blocks = layer_blocks(model, "layers", tokens, tail=["head"])
        >>> boundary = tokens
        >>> for block in blocks:
        ...     boundary = block(**boundary) if isinstance(boundary, dict) else block(boundary)
        >>> len(blocks), torch.equal(boundary, model(tokens))
        (4, True)
    """
    stack = _find_layers(model, layers)
    seen = watch_layers(model, layers, stack, example)
    others = [
        LayerBlock(layer, call, is_last=layer is stack[-1]) for layer, call in zip(stack[1:], seen.calls, strict=True)
    ]
    end = [make_tail(model, stack[-1], tail, example, partial(_find, model))] if tail else []
    return [FirstBlock(model, layers, seen), *others, *end]


class LayerBlock(nn.Module):
    """A layer of a model as a block.

    Args:
        layer: The layer.
        call: How the model calls it.
        is_last: Whether it gives the hidden state alone.
    """

    def __init__(self, layer: nn.Module, call: LayerCall, *, is_last: bool) -> None:
        super().__init__()
        self.layer = layer
        self.call = call
        self.is_last = is_last

    def forward(self, hidden: Tensor, **passengers: Any) -> Any:
        """Map a boundary to the next one."""
        output = self.call.run(self.layer, hidden, passengers)
        return output if self.is_last else {HIDDEN: output, **passengers}


class FirstBlock(nn.Module):
    """What a model does up to the end of its first layer, and the tensors that all later layers get.

    Args:
        model: The model, of which this block has the parts that it uses.
        layers: Path of the layers.
        seen: How the model calls them.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, layers: str, seen: LayerStack) -> None:
        super().__init__()
        # Past nn.Module on purpose: registered, the whole model would be part of the block.
        self.__dict__["_model"] = model
        self._path = layers
        self._calls = seen.calls
        self._first_parts = seen.first_parts
        self._passengers = tuple(dict.fromkeys(name for call in seen.calls for name in call.names if name != HIDDEN))
        self.parts = nn.ModuleList([*seen.before, _find_layers(model, layers)[0]])
        for name, value in self._own_tensors(model):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Map the model's input to the first boundary."""
        found = self._run(args, kwargs)
        if self._left_out(found):
            found = {**self._find_masks(args, kwargs), **found}
        if left_out := self._left_out(found):
            raise PartitionError(
                f"`{self._path}` must get `{left_out[0]}` in every batch, as for the example, but the model leaves "
                "it out. Hand the model a mask also where nothing is padded, or give an example like the "
                "batches."
            )
        # In one order, also where masks were found apart.
        return {name: found[name] for name in (HIDDEN, *self._passengers)}

    def _left_out(self, found: Mapping[str, Tensor]) -> list[str]:
        return [name for name in self._passengers if name not in found]

    def _run(self, args: Any, kwargs: Any, first: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """Run the model up to its last layer; give what the layers get.

        Args:
            args: Arguments of the model.
            kwargs: Keyword arguments of the model.
            first: What runs instead of the first layer.
        """
        found: dict[str, Tensor] = {}

        def stand_in(call: LayerCall) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                found.update(call.read(args, kwargs))
                if call is self._calls[-1]:
                    raise LastLayerReached
                return pack(call.parts, found)

            return forward

        forwards = [*([first] if first else []), *(stand_in(call) for call in self._calls)]
        layers = _find_layers(self._model, self._path)[-len(forwards) :]
        with _replaced_forwards(layers, forwards), until_last_layer():
            self._model(*args, **kwargs)
        return found

    def _find_masks(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Give what the layers would get if a row were padded, for all rows.

        Whether the model leaves masks out depends on all rows of a batch. With masks in every boundary, a row does not
        depend on its neighbours, and ranks that load parts of a batch have boundaries of one form.
        """
        masks = find_masks(self._model, args, kwargs)
        found: dict[str, Tensor] = {}

        def first(*args: Any, **kwargs: Any) -> Any:
            given = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            return pack(self._first_parts, {HIDDEN: given})

        everything = [*self.modules(), *containers(self._model, self._path)]
        with preserved_random_states(), torch.no_grad(), preserved_modes(everything):
            self.eval()
            for padding in PADDINGS if masks else ():
                inputs = with_padded_rows(args, kwargs, masks, padding)
                given = self._run_padded(inputs, first)
                found |= {name: inputs.of_batch(value) for name, value in given.items()}
                if not self._left_out(found):
                    break
        return found

    def _run_padded(self, inputs: PaddedInputs, first: Callable[..., Any]) -> dict[str, Tensor]:
        try:
            return self._run(inputs.args, inputs.kwargs, first)
        except Exception as error:
            raise PartitionError(
                f"`{self._path}` must get the masks of padded batches in every batch, so the model must run with a row "
                f"that is padded beside the others, but raises {type(error).__name__}: {error}. Use attention that "
                'always has masks (for Hugging Face: `attn_implementation="eager"`).'
            ) from error

    def train(self, mode: bool = True) -> FirstBlock:
        """Set the mode of what runs, and of the containers around it."""
        for container in containers(self._model, self._path):
            container.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FirstBlock:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it untyped
        # Parameters change in place, buffers are replaced.
        for container, prefix in zip(containers(self._model, self._path), _prefixes(self._path), strict=True):
            for name in container._buffers.keys() & {own[len(prefix) :] for own in self._buffers}:
                container._buffers[name] = self._buffers[prefix + name]
        return self

    def _own_tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
        """Give what the containers of the layers hold themselves, such as a class token."""
        for container, prefix in zip(containers(model, self._path), _prefixes(self._path), strict=True):
            yield from ((prefix + name, value) for name, value in container._parameters.items())
            yield from ((prefix + name, value) for name, value in container._buffers.items())


def _find_layers(model: nn.Module, path: str) -> list[nn.Module]:
    layers = list(_find(model, path).children())
    if len(layers) < 2:
        raise PartitionError(
            f"`{path}` must be a list of at least two layers, but has {len(layers)}. Name the `nn.ModuleList` of the "
            "layers, such as 'model.layers' or 'transformer.h'."
        )
    return layers


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        lists = [name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        raise PartitionError(
            f"`{path}` must be the path of a module of `{type(model).__name__}`, which has none of that name. Its "
            f"lists of modules are {', '.join(f'`{name}`' for name in lists) or 'none'}."
        ) from None


def _prefixes(path: str) -> list[str]:
    """Give the paths of the containers around the layers, as prefixes of names of attributes that have no dots."""
    parts = path.split(".")
    return ["__".join([*parts[:count], ""]) for count in range(len(parts))]


@contextmanager
def _replaced_forwards(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    kept = [layer.__dict__.get("forward") for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            del layer.__dict__["forward"]
            if own is not None:
                layer.__dict__["forward"] = own
