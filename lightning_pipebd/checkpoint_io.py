"""Checkpoint files that are whole or not there, and that say so when they were damaged.

A checkpoint is one ordinary file of :func:`torch.save`, hence a zip archive. Its SHA-256 digests are in the archive's
comment, where they are part of the file and in nobody's way: one of the whole file, and one of each block's parameters
and buffers, which tells what a damage has hit.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

__all__ = ["CheckedCheckpointIO", "CheckpointError", "choose_intact", "newest_intact"]

# The end of a zip archive: signature, 16 bytes of directory, length of the comment, comment.
_END = struct.Struct("<4s16sH")
_SIGNATURE = b"PK\x05\x06"
_MAX_COMMENT = 65_535
_LEFT_OVER_S = 600
_TITLE = "sha256 of a checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint file is damaged."""


class _Digests(NamedTuple):
    file: str
    blocks: dict[str, str]


class CheckedCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically and with digests, and verify these on load.

    The strategy uses it unless the trainer has a ``CheckpointIO`` of its own. A file appears under its name only when
    all of it is on the disk; whatever happens before, the file of that name, if any, is still the previous one. Remote
    file systems (``s3://...``) are left to Lightning's own writer and are not verified.

    Args:
        on_save_error: ``"raise"`` ends the run when the file system refuses a checkpoint, for example because it is
            full; ``"warn"`` goes on. The previous checkpoint survives either way.

    Attributes:
        block_of: Tells the block of a name in the checkpoint's ``state_dict``; set by the strategy.

    Raises:
        ValueError: ``on_save_error`` is another word.
    """

    def __init__(self, on_save_error: str = "raise") -> None:
        if on_save_error not in ("raise", "warn"):
            raise ValueError(f"`on_save_error` must be 'raise' or 'warn', but is {on_save_error!r}. Choose one.")
        self._on_save_error = on_save_error
        self._has_failed = False
        self.block_of: Callable[[str], str | None] = _of_no_block

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _publish(self._sealed(checkpoint), target)
        except OSError as error:
            self._has_failed = True
            msg = f"Checkpoint {target} could not be written ({error}); the previous checkpoints are kept."
            if self._on_save_error == "raise":
                raise OSError(error.errno, msg) from error
            warnings.warn(f"{msg} Training goes on.", stacklevel=2)
        else:
            self._has_failed = False

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            CheckpointError: The file is damaged; names it, and the blocks that are hit where these can be told.
        """
        if not _is_local(path) or not Path(path).is_file():
            loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            return loaded
        damage = self.find_damage(path)
        if damage:
            raise CheckpointError(f"Checkpoint {path} is damaged: {damage}. Continue from another one.")
        try:
            loaded = super().load_checkpoint(path, *args, **kwargs)
        except (EOFError, KeyError) as error:
            raise CheckpointError(f"Checkpoint {path} is damaged: it cannot be read ({error!r}).") from error
        return loaded

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, unless the one that should take its place could not be written."""
        if self._has_failed:
            warnings.warn(f"Checkpoint {path} is kept, because the last one could not be written.", stacklevel=2)
            return
        super().remove_checkpoint(path)

    def find_damage(self, path: Any) -> str:
        """Say what is wrong with a local file; empty if it is intact, or without digests and in one piece."""
        content = Path(path).read_bytes()
        try:
            digests, body = _unseal(content)
        except ValueError as error:
            return str(error)
        if digests is None or _digest_file(body, digests.blocks) == digests.file:
            return ""
        return f"its bytes are not those that were written{self._find_blocks(content, digests)}"

    def _find_blocks(self, content: bytes, digests: _Digests) -> str:
        try:
            state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")["state_dict"]
            found = _digest_blocks(state, self.block_of)
        except Exception:
            # Anything can be raised by a damaged file; that it is damaged is known already.
            return ""
        hit = [name for name, digest in digests.blocks.items() if found.get(name) != digest]
        return f" (block {', '.join(hit)})" if hit else " (no block's weights are hit)"

    def _sealed(self, checkpoint: Mapping[str, Any]) -> bytes:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        return _seal(buffer.getvalue(), _digest_blocks(checkpoint.get("state_dict", {}), self.block_of))


def choose_intact(path: Any, checkpoint_io: CheckpointIO) -> Any:
    """Give the path, or if it is damaged that of the newest intact checkpoint beside it, with a warning."""
    if not isinstance(checkpoint_io, CheckedCheckpointIO) or not _is_local(path) or not Path(path).is_file():
        return path
    damage = checkpoint_io.find_damage(path)
    other = newest_intact(path, checkpoint_io) if damage else None
    if other is None:
        return path
    warnings.warn(f"Checkpoint {path} is damaged: {damage}. The newest intact one is taken: {other}.", stacklevel=2)
    return other


def newest_intact(damaged: Any, checkpoint_io: CheckedCheckpointIO) -> Path | None:
    """Give the newest intact checkpoint in the directory of a damaged one, ``None`` if there is none."""
    others = [path for path in Path(damaged).parent.glob("*.ckpt") if path.resolve() != Path(damaged).resolve()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if not checkpoint_io.find_damage(path):
            return path
    return None


def _of_no_block(name: str) -> None:
    # No lambda: strategies may be pickled before they are used.
    return None


def _is_local(path: Any) -> bool:
    return "://" not in str(path)


def _publish(content: bytes, target: Path) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _remove_left_over(partial, target)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too, must survive a power cut
    finally:
        os.close(directory)


def _remove_left_over(partial: Path, target: Path) -> None:
    # What processes left that were killed while they saved this file; a part that somebody writes now is younger.
    now_s = partial.stat().st_mtime
    for other in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with suppress(OSError):
            if now_s - other.stat().st_mtime > _LEFT_OVER_S:
                other.unlink()


def _seal(archive: bytes, blocks: dict[str, str]) -> bytes:
    signature, directory, length = _END.unpack(archive[-_END.size :])
    assert signature == _SIGNATURE
    assert length == 0
    for known in (blocks, {}):
        # Digests have one length, so the comment's is known before the digest that covers it.
        draft = _comment(_Digests("0" * 64, known))
        if len(draft) <= _MAX_COMMENT:
            break
    body = archive[: -_END.size] + _END.pack(signature, directory, len(draft))
    return body + _comment(_Digests(_digest_file(body, known), known))


def _digest_file(body: bytes, blocks: dict[str, str]) -> str:
    return hashlib.sha256(body + json.dumps(blocks).encode()).hexdigest()


def _comment(digests: _Digests) -> bytes:
    return json.dumps({"title": _TITLE, **digests._asdict()}).encode()


def _unseal(content: bytes) -> tuple[_Digests | None, bytes]:
    start = content.rfind(_SIGNATURE, max(0, len(content) - _END.size - _MAX_COMMENT))
    while start >= 0:
        end = start + _END.size
        if end <= len(content) and _END.unpack(content[start:end])[2] == len(content) - end:
            return _read_comment(content[end:]), content[:end]
        start = content.rfind(_SIGNATURE, max(0, len(content) - _END.size - _MAX_COMMENT), start)
    if content[:2] != b"PK" and content[:1] == b"\x80":
        return None, content  # a pickle, as torch wrote before it wrote archives
    raise ValueError("its end is missing or unreadable")


def _read_comment(comment: bytes) -> _Digests | None:
    if not comment:
        return None  # as plain Lightning writes it
    try:
        fields = json.loads(comment)
        if fields.pop("title") != _TITLE:
            raise ValueError
        digests = _Digests(**fields)
        if _comment(digests) != comment:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("its digests are unreadable") from None
    return digests


def _digest_blocks(state: Mapping[str, Any], block_of: Callable[[str], str | None]) -> dict[str, str]:
    digests: dict[str, Any] = {}
    for name, value in state.items():
        block = block_of(name)
        if block is not None and isinstance(value, Tensor):
            digest = digests.setdefault(block, hashlib.sha256())
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            # Of the bytes, as they lie: a flipped bit in a NaN, or -0, is a difference.
            flat = value.detach().cpu().resolve_conj().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return {block: digest.hexdigest() for block, digest in digests.items()}
