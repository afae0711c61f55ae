"""Checkpoint files: whole or not there, verified on load."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pipebd.checkpoint_io import CheckedCheckpointIO, CheckpointError, newest_intact

NUM_CORRUPTIONS = int(os.environ.get("NUM_CORRUPTIONS", "60"))


def block_of(name: str) -> str | None:
    return name.split(".")[0] if "." in name else None


def make_io(**options: Any) -> CheckedCheckpointIO:
    checkpoint_io = CheckedCheckpointIO(**options)
    checkpoint_io.block_of = block_of
    return checkpoint_io


def make_checkpoint(value: float = 1.0) -> dict[str, Any]:
    state = {f"{block}.weight": torch.full((16, 16), value) for block in ("first", "second")}
    return {"state_dict": {**state, "scale": torch.zeros(())}, "epoch": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.ckpt"
    make_io().save_checkpoint(make_checkpoint(), path)
    return path


def test_a_checkpoint_is_one_file_that_torch_and_zip_tools_read(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["epoch"] == 3
    assert torch.equal(checkpoint["state_dict"]["first.weight"], torch.ones(16, 16))
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert b'"blocks": {"first": "' in archive.comment


def test_an_intact_checkpoint_loads(saved: Path) -> None:
    loaded = make_io().load_checkpoint(saved, weights_only=True)
    assert torch.equal(loaded["state_dict"]["second.weight"], torch.ones(16, 16))


def test_a_checkpoint_of_plain_lightning_loads(tmp_path: Path) -> None:
    torch.save(make_checkpoint(), tmp_path / "new.ckpt")
    torch.save(make_checkpoint(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("new.ckpt", "old.ckpt"):
        assert make_io().load_checkpoint(tmp_path / name, weights_only=True)["epoch"] == 3


def corrupt(content: bytes, random_source: random.Random) -> bytes:
    kind = random_source.choice(["flip", "truncate", "zero", "cut", "extend"])
    place = random_source.randrange(len(content))
    if kind == "truncate":
        return content[:place]
    if kind == "extend":
        return content + bytes(1 + place % 100)
    if kind == "cut":
        return content[:place] + content[place + 1 + random_source.randrange(64) :]
    if kind == "zero":
        length = min(512, len(content) - place)
        return content[:place] + bytes(length) + content[place + length :]
    return content[:place] + bytes([content[place] ^ (1 << random_source.randrange(8))]) + content[place + 1 :]


def test_no_corrupted_checkpoint_is_loaded(saved: Path) -> None:
    content, random_source, num_tried = saved.read_bytes(), random.Random(5), 0
    damaged = saved.with_name("damaged.ckpt")
    while num_tried < NUM_CORRUPTIONS:
        changed = corrupt(content, random_source)
        if changed == content:
            continue
        damaged.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"damaged\.ckpt is damaged"):
            make_io().load_checkpoint(damaged, weights_only=True)
        num_tried += 1


def test_every_byte_of_a_file_counts(saved: Path) -> None:
    content = saved.read_bytes()
    damaged = saved.with_name("damaged.ckpt")
    for place in range(0, len(content), max(1, len(content) // 150)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        assert make_io().find_damage(damaged), place


def test_a_checkpoint_without_a_block_is_not_loaded(saved: Path) -> None:
    other = saved.with_name("other.ckpt")
    checkpoint = make_checkpoint()
    del checkpoint["state_dict"]["second.weight"]
    torch.save(checkpoint, other)
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(other, "a") as target:
        target.comment = archive.comment
    with pytest.raises(CheckpointError, match=r"not those that were written \(block second\)"):
        make_io().load_checkpoint(other, weights_only=True)


def test_a_damaged_block_is_named(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    ones = torch.ones(16, 16).numpy().tobytes()
    content[content.rfind(ones) + 5] ^= 1
    saved.write_bytes(content)
    # torch checks no sums of the archive's members on load.
    with pytest.raises(CheckpointError, match=r"a\.ckpt is damaged: .* \(block second\)"):
        make_io().load_checkpoint(saved, weights_only=True)


def fail_fsync(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_previous_checkpoint_and_ends_the_run(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_fsync)
    with pytest.raises(OSError, match=r"a\.ckpt could not be written \(.*No space left on device\)"):
        make_io().save_checkpoint(make_checkpoint(2.0), saved)
    monkeypatch.undo()
    assert [path.name for path in saved.parent.iterdir()] == ["a.ckpt"]
    assert make_io().load_checkpoint(saved)["state_dict"]["first.weight"][0, 0] == 1.0


def test_a_run_that_goes_on_without_its_checkpoint_keeps_the_previous_ones(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_io = make_io(on_save_error="warn")
    monkeypatch.setattr(os, "fsync", fail_fsync)
    with pytest.warns(UserWarning, match="the previous checkpoints are kept. Training goes on"):
        checkpoint_io.save_checkpoint(make_checkpoint(2.0), saved.with_name("b.ckpt"))
    with pytest.warns(UserWarning, match="is kept, because the last one could not be written"):
        checkpoint_io.remove_checkpoint(saved)
    monkeypatch.undo()
    assert not make_io().find_damage(saved)
    checkpoint_io.save_checkpoint(make_checkpoint(2.0), saved.with_name("b.ckpt"))
    checkpoint_io.remove_checkpoint(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["b.ckpt"]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="`on_save_error` must be 'raise' or 'warn', but is 'ignore'"):
        CheckedCheckpointIO(on_save_error="ignore")


KILLED = """
import os, signal, sys, torch
from lightning_pipebd.checkpoint_io import CheckedCheckpointIO

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
CheckedCheckpointIO().save_checkpoint({"state_dict": {"a.b": torch.zeros(9)}}, sys.argv[1])
"""


@pytest.mark.spawn
def test_a_process_that_is_killed_while_it_saves_leaves_the_previous_checkpoint(saved: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved)], env=environment, timeout=90)
    assert done.returncode == -9
    assert make_io().load_checkpoint(saved)["state_dict"]["first.weight"][0, 0] == 1.0
    # What it left takes no room for ever: the next process that saves the file much later removes it.
    (left,) = saved.parent.glob(".*.partial")
    make_io().save_checkpoint(make_checkpoint(), saved)
    assert left.exists(), "somebody may be writing it now"
    os.utime(left, (0, 0))
    make_io().save_checkpoint(make_checkpoint(), saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_newest_intact_checkpoint_is_found(saved: Path) -> None:
    names = ["old.ckpt", "good.ckpt", "bad.ckpt", "last.ckpt"]
    for age, name in enumerate(names):
        path = saved.with_name(name)
        make_io().save_checkpoint(make_checkpoint(), path)
        os.utime(path, (1000 + age, 1000 + age))
    os.utime(saved, (10, 10))
    for name in ("bad.ckpt", "last.ckpt"):
        path = saved.with_name(name)
        path.write_bytes(path.read_bytes()[:-100])
        os.utime(path, (2000, 2000))
    assert newest_intact(saved.with_name("last.ckpt"), make_io()) == saved.with_name("good.ckpt")
    for name in ("old.ckpt", "good.ckpt", "a.ckpt"):
        saved.with_name(name).unlink()
    assert newest_intact(saved.with_name("last.ckpt"), make_io()) is None
