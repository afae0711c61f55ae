"""The memory of a GPU, opened in several processes: CUDA's inter-process communication, as torch has it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["CudaMemory", "mark_stream"]


class CudaMemory:
    """A GPU's :class:`~lightning_pipebd.runtime.device_slots.DeviceMemory`.

    Threads begin on device 0: whatever one asks of CUDA here, it asks with this GPU as its current device.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        # With its number, also where none was said.
        self._device = torch.empty(0, device=device).device
        # Beside the stream on which this rank computes, so that what was received need not wait for what is computed.
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self.name = str(torch.cuda.get_device_properties(self._device).uuid)

    def allocate(self, num_bytes: int) -> Tensor:
        """Give a buffer that lies as long as its storage lives and some process has it open."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def export(self, buffer: Tensor) -> bytes:
        """Give that by which one other process opens a buffer.

        Raises:
            RuntimeError: The allocator, the driver or the container does not let memory be opened elsewhere.
        """
        with torch.cuda.device(self._device):
            return pickle.dumps(buffer.untyped_storage()._share_cuda_())  # type: ignore[no-untyped-call]

    def open(self, export: bytes) -> Tensor:
        """Give another process's buffer.

        Raises:
            RuntimeError: It cannot be opened here.
        """
        # Its owner's number of the device may be another one. And an event of its owner's is not to be waited for: who
        # hears of a buffer has heard that what was written there is there.
        _, *place, _ = pickle.loads(export)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            storage = torch.UntypedStorage._new_shared_cuda(self._device.index, *place, False)
            return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def mark(self) -> Callable[[], None]:
        """Give what waits for all that this thread has asked of its current stream so far."""
        event = mark_stream(torch.cuda.current_stream(self._device))

        def wait() -> None:
            with torch.cuda.device(self._device):
                event.synchronize()

        return wait

    def take(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Give copies, made when this returns."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            copies = [part.clone() for part in parts]
            self.mark()()
        for copy in copies:
            # Who computes with it may have more to do with it when it is freed.
            copy.record_stream(torch.cuda.default_stream(self._device))
        return copies


def mark_stream(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Mark what a stream was given to do so far."""
    # Whoever waits for it sleeps, instead of taking a processor from the blocks' thread.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
