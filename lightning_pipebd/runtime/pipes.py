"""Pipes: how a rank tells another one of its host that something lies ready in shared memory.

A pipe has no name. The writer makes it, the reader opens the reading end by the writer's process and file number, and
the writer lets go of that end. Then each side learns of the other's end: a dead writer ends the stream, a dead reader
breaks the pipe.
"""

from __future__ import annotations

import os
import select
import weakref

from lightning_pipebd.runtime.shared_memory import open_file

__all__ = ["PipeReader", "PipeWriter"]

_GONE = "the process at the other end has closed it"


class PipeWriter:
    """The writing end of a new pipe, which is closed with this object.

    Attributes:
        reading_end: File number by which the reader opens its end; to be let go of when it has.
    """

    def __init__(self) -> None:
        self.reading_end, self._file = os.pipe()
        weakref.finalize(self, os.close, self._file).atexit = False
        self._let_go = weakref.finalize(self, os.close, self.reading_end)
        self._let_go.atexit = False

    def let_go(self) -> None:
        """Leave the reading end to the reader, so that its death is noticed."""
        self._let_go()

    def write(self, data: bytes) -> None:
        """Write, whole and in order.

        Raises:
            ConnectionError: The reader has ended.
        """
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]


class PipeReader:
    """The reading end of another process's pipe, which is closed with this object.

    Args:
        pid: Process of the writer.
        reading_end: Its number for this end.

    Raises:
        OSError: The process has ended, or lets nobody look at its files.
    """

    def __init__(self, pid: int, reading_end: int) -> None:
        self._file = open_file(pid, reading_end, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file).atexit = False
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLIN)

    def read_some(self, most: int) -> bytes:
        """Wait for a byte, and give what is there, up to some number of bytes.

        Raises:
            ConnectionError: The writer has ended.
        """
        part = os.read(self._file, most)
        if not part:
            raise ConnectionResetError(_GONE)
        return part

    def read(self, num_bytes: int, timeout_s: float | None = None) -> bytes:
        """Wait for this number of bytes.

        Raises:
            ConnectionError: The writer has ended.
            TimeoutError: Nothing came for this time.
        """
        parts = []
        while num_bytes:
            if timeout_s is not None and not self._poll.poll(timeout_s * 1000):
                raise TimeoutError(f"nothing came for {timeout_s:g} s")
            part = self.read_some(num_bytes)
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)
