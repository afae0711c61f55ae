"""Blocks of models that call a list of layers one after another, but whose ``forward`` no recording can follow.

::

    model.forward    embeddings, masks, tables   layer 0   layer 1   ...   layer n-1   norm, head
    blocks           [------------- 0 -----------------]   [- 1 -]   ...   [- n-1 -]   [- tail -]

Block 0 runs the model's own ``forward``, up to what it hands to the last layer; the layers after the first only note
how they are called. The boundary is a dictionary: the hidden state, and beside it all other tensors that any later
layer gets (masks, rotary tables), which pass through the blocks unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_pipebd.runtime.layer_calls import (
    HIDDEN,
    LastLayerReached,
    LayerCall,
    containers,
    until_last_layer,
    watch_layers,
)
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["FirstBlock", "LayerBlock", "layer_blocks"]


def layer_blocks(model: nn.Module, layers: str, example: Any, *, tail: Sequence[str] = ()) -> list[nn.Module]:
    """Give a model's layers as blocks, for ``teacher_blocks`` and ``student_blocks``.

    For models whose ``forward`` cannot be cut at module paths, such as those of Hugging Face. A boundary is a
    dictionary of the hidden state and of the other tensors that layers get. The last layer gives the hidden state only.

    Args:
        model: The model; run once on the example, up to its last layer, in evaluation mode and without gradient.
        layers: Path of the ``nn.ModuleList`` whose modules the model calls one after another, each on what the one
            before it gave. At least two.
        example: An input of the model: a tensor, a tuple of arguments or a dictionary of keyword arguments. Later
            batches must be of the same form; their shapes are free.
        tail: Paths of modules that follow the last layer, each on what the one before it gave, such as the last norm
            and the head: they make one more block.

    Returns:
        One block per layer, the first with all that comes before it, and one for the tail if there is one.

    Raises:
        PartitionError: There is no such path, or the layers are not called so; the message names the layer.

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
    calls, before = watch_layers(model, layers, stack, example)
    first = FirstBlock(model, layers, before, calls)
    others = [LayerBlock(layer, call, is_last=layer is stack[-1]) for layer, call in zip(stack[1:], calls, strict=True)]
    end = [nn.Sequential(*(_find(model, path) for path in tail))] if tail else []
    return [first, *others, *end]


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
        before: Modules that run before the first layer.
        calls: How the model calls each layer but the first.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, layers: str, before: Sequence[nn.Module], calls: Sequence[LayerCall]) -> None:
        super().__init__()
        # Past nn.Module on purpose: registered, the whole model would be part of the block.
        self.__dict__["_model"] = model
        self._path = layers
        self._calls = tuple(calls)
        self.parts = nn.ModuleList([*before, _find_layers(model, layers)[0]])
        for name, value in self._own_tensors(model):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Map the model's input to the first boundary."""
        found: dict[str, Tensor] = {}

        def stand_in(call: LayerCall) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                found.update(call.read(args, kwargs))
                if call is self._calls[-1]:
                    raise LastLayerReached
                return call.pack(found[HIDDEN])

            return forward

        layers = _find_layers(self._model, self._path)[1:]
        with _replaced_forwards(layers, [stand_in(call) for call in self._calls]), until_last_layer():
            self._model(*args, **kwargs)
        hidden = found.pop(HIDDEN)
        return {HIDDEN: hidden, **found}

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
