"""What is under way between ranks, and how it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Later", "Pending", "Reported", "TransportError", "Works"]


class TransportError(RuntimeError):
    """A message could not be delivered: a peer has ended, or the network has failed."""


class Pending(Protocol):
    """Something under way."""

    def wait(self) -> None:
        """Return when it is done; raise :class:`TransportError` when it cannot be done any more."""


class Works:
    """Works of one message; holds the tensors, which the sender must not free before they have left.

    Args:
        works: Torch's, of the message's parts.
        tensors: What they read.
        subject: What is being done, for errors.
    """

    def __init__(self, works: list[Any], tensors: list[Tensor], subject: str) -> None:
        self._works = works
        self._tensors = tensors
        self._subject = subject

    def wait(self) -> None:
        """Return when the message has arrived."""
        try:
            with Reported(self._subject):
                for work in self._works:
                    work.wait()
        finally:
            self._works, self._tensors = [], []


class Later:
    """Something whose second half is done by whoever waits for it.

    Args:
        finish: The second half.
        subject: What is being done, for errors.
    """

    def __init__(self, finish: Callable[[], None], subject: str) -> None:
        self._finish: Callable[[], None] | None = finish
        self._subject = subject

    def wait(self) -> None:
        """Do the second half; nothing, the second time."""
        finish, self._finish = self._finish, None
        if finish is not None:
            with Reported(self._subject):
                finish()


class Reported:
    """Turns torch's plain errors, when an operation begins as well as while it is waited for, into ours.

    Args:
        subject: What is being done.
    """

    __slots__ = ("_subject",)

    def __init__(self, subject: str) -> None:
        self._subject = subject

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (RuntimeError, OSError)):
            raise TransportError(f"{self._subject} failed: {error}") from error
