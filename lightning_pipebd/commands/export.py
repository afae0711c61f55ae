"""`pipebd export`: the plain student of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["run", "student_state"]

_DESCRIPTION = """\
Write the student of a checkpoint as a plain state dictionary, which `student.load_state_dict` takes without this
package and without Lightning. The ending of the output decides: .safetensors (needs the package safetensors), anything
else is written by torch.save.

exit codes: 0 written, 1 the checkpoint cannot be read or has no student
"""
_EPILOG = """\
examples:
  pipebd export lightning_logs/version_0/checkpoints/last.ckpt student.pt
  pipebd export last.ckpt student.safetensors --dtype bfloat16
"""
_PREFIX = "student."
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    parser = argparse.ArgumentParser(
        prog="pipebd export",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint that a fit has written")
    parser.add_argument("output", type=Path, help="file to write; must not exist yet")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="convert floating-point tensors; default as they are")
    parser.add_argument("--overwrite", action="store_true", help="write even if the file exists")
    options = parser.parse_args(list(arguments))
    try:
        _export(options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def student_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Give the student's state under the names that the student itself uses.

    Raises:
        ValueError: The checkpoint is not that of a module with a student.

    Example:
        >>> student_state({"state_dict": {"student.fc.weight": torch.ones(1), "adapters.x": torch.ones(1)}})
        {'fc.weight': tensor([1.])}
    """
    entries = checkpoint.get("state_dict", {})
    state = {name[len(_PREFIX) :]: value for name, value in entries.items() if name.startswith(_PREFIX)}
    if not state:
        found = ", ".join(list(entries)[:3]) or "none"
        msg = (
            f"`checkpoint` must have entries that begin with {_PREFIX!r}, but has {found}. "
            "Export the checkpoint of a fit of a BlockwiseDistillationModule."
        )
        raise ValueError(msg)
    return state


def _export(options: argparse.Namespace) -> None:
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"`output` must not exist yet, but {options.output} does. Choose another or add --overwrite.")
    state = student_state(torch.load(options.checkpoint, map_location="cpu", weights_only=True))
    if options.dtype:
        dtype = _DTYPES[options.dtype]
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    _write(state, options.output)
    size = sum(value.numel() * value.element_size() for value in state.values())
    sys.stdout.write(f"{options.output}: {len(state)} tensors, {size / 1024**2:.1f} MiB\n")


def _write(state: dict[str, Tensor], output: Path) -> None:
    if output.suffix != ".safetensors":
        torch.save(state, output)
        return
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("Writing .safetensors needs the package safetensors: `pip install safetensors`.") from error
    # The format has no shared or strided memory.
    save_file({name: value.contiguous().clone() for name, value in state.items()}, output)
