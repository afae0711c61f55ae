"""Models for tests, written in one line: a function and the modules it uses; and running blocks in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_pipebd.runtime.partition import Partition, call_block

__all__ = ["Container", "run_in_a_row"]


class Container(nn.Module):
    """A module whose `forward` calls ``function(self, x)``.

    Lambdas may use modules, parameters and buffers by attribute, as any `forward` does.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        *,
        parameters: dict[str, nn.Parameter] | None = None,
        buffers: dict[str, Tensor] | None = None,
        **modules: nn.Module,
    ) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)
        for name, parameter in (parameters or {}).items():
            self.register_parameter(name, parameter)
        for name, buffer in (buffers or {}).items():
            self.register_buffer(name, buffer)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def run_in_a_row(partition: Partition, boundary: Any) -> Any:
    """Run all blocks and what follows the last of them."""
    for block in (*partition.blocks, *([] if partition.tail is None else [partition.tail])):
        boundary = call_block(block, boundary)
    return boundary
