"""What blocks in CUDA graphs give lies in the graphs' own memory, which the next call of any compiled block may reuse.

A graph of ``torch.compile`` writes its results to the same addresses whenever it runs. Its manager
(``torch._inductor.cudagraph_trees``) keeps them only until a compiled function is called anew while no backward pass is
pending. Then reading them is an error at first, and later gives other numbers. So what must live longer is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["copy_gradients", "copy_tensors", "has_compiled", "makes_graphs"]

TreeT = TypeVar("TreeT")


def makes_graphs(options: Mapping[str, Any] | None) -> bool:
    """Tell whether these keyword arguments of ``torch.compile`` may make CUDA graphs on a GPU.

    In doubt they do: then copies are made that nobody needs.

    Args:
        options: The arguments; ``None`` compiles nothing.

    Example:
        >>> makes_graphs({"mode": "reduce-overhead"}), makes_graphs({"options": {"triton.cudagraphs": True}})
        (True, True)
        >>> makes_graphs({}), makes_graphs({"mode": "max-autotune-no-cudagraphs"}), makes_graphs(None)
        (False, False, False)
    """
    if options is None:
        return False
    backend = options.get("backend") or "inductor"
    if backend in ("eager", "aot_eager"):
        return False
    if backend != "inductor":
        return True
    from torch._inductor import config, list_mode_options  # takes long to import, and is not wanted before

    chosen = list_mode_options(options.get("mode") or "default") | dict(options.get("options") or {})
    return bool(config.triton.cudagraphs) or any("cudagraph" in name and value for name, value in chosen.items())


def has_compiled(models: Iterable[nn.Module]) -> bool:
    """Tell whether a module of some models was compiled by itself, by ``compile()`` or ``torch.compile``.

    Example:
        >>> compiled = nn.Linear(2, 2)
        >>> compiled.compile(backend="eager")
        >>> has_compiled([nn.Sequential(compiled)]), has_compiled([nn.Sequential(nn.Linear(2, 2))])
        (True, False)
    """
    modules = (module for model in models for module in model.modules())
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules)


def copy_tensors(tree: TreeT) -> TreeT:
    """Give a tree whose tensors have memory of their own; gradients still reach the originals."""
    copied: TreeT = pytree.tree_map_only(Tensor, Tensor.clone, tree)
    return copied


def copy_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let the gradients of parameters have memory of their own."""
    found = [(parameter, gradient) for parameter in parameters if (gradient := parameter.grad) is not None]
    dense = [(parameter, gradient) for parameter, gradient in found if gradient.layout is torch.strided]
    copies = [torch.empty_like(gradient) for _, gradient in dense]
    if copies:
        # At once: single copies would cost more calls than a graph saves.
        torch._foreach_copy_(copies, [gradient for _, gradient in dense])
    for (parameter, _), copied in zip(dense, copies, strict=True):
        parameter.grad = copied
    for parameter, gradient in found:
        if gradient.layout is not torch.strided:
            parameter.grad = gradient.clone()
