"""`pipebd export`: the plain student of a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["make_parser", "pick_candidates", "run", "student_state"]

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
  pipebd export last.ckpt student.pt --pick features.3=1 --pick features.5=0
"""
_PREFIX = "student."
_COUNT = ".num_candidates"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd export",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint that a fit has written")
    parser.add_argument("output", type=Path, help="file to write; must not exist yet")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="convert floating-point tensors; default as they are")
    parser.add_argument(
        "--pick",
        action="append",
        default=[],
        metavar="PLACE=NUMBER",
        help="candidate to keep at a place of the student that has several; once for each place",
    )
    parser.add_argument("--overwrite", action="store_true", help="write even if the file exists")
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    options = make_parser().parse_args(list(arguments))
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


def pick_candidates(state: dict[str, Tensor], picks: Mapping[str, int]) -> dict[str, Tensor]:
    """Keep one candidate of every place, under the place's own name.

    Raises:
        ValueError: A place is left open, or a place or a candidate is picked that the student does not have.

    Example:
        >>> state = {f"layer.candidates.{number}.weight": torch.full((1,), number) for number in (0, 1)}
        >>> pick_candidates({**state, "layer.num_candidates": torch.tensor(2)}, {"layer": 1})
        {'layer.weight': tensor([1])}
    """
    places = {name[: -len(_COUNT)]: int(value) for name, value in state.items() if name.endswith(_COUNT)}
    unknown = [f"{place}={number}" for place, number in picks.items() if not 0 <= number < places.get(place, 0)]
    left = [place for place in places if place not in picks]
    if unknown or left:
        known = ", ".join(f"{place} ({count} candidates)" for place, count in places.items()) or "none"
        msg = (
            f"`--pick` must name one candidate of every place, but {', '.join(unknown or left)} "
            f"{'does not exist' if unknown else 'is left open'}. Places: {known}."
        )
        raise ValueError(msg)
    kept = {}
    for name, value in state.items():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is None:
            kept[name] = value
        elif name.startswith(picked := f"{place}.candidates.{picks[place]}."):
            kept[f"{place}.{name[len(picked) :]}"] = value
    return kept


def _read_picks(given: Sequence[str]) -> dict[str, int]:
    picks = {}
    for pick in given:
        place, _, number = pick.rpartition("=")
        if not place or not number.isdigit():
            raise ValueError(f"`--pick` must be PLACE=NUMBER, but is {pick!r}. Write for example features.3=1.")
        picks[place] = int(number)
    return picks


def _export(options: argparse.Namespace) -> None:
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"`output` must not exist yet, but {options.output} does. Choose another or add --overwrite.")
    state = student_state(torch.load(options.checkpoint, map_location="cpu", weights_only=True))
    state = pick_candidates(state, _read_picks(options.pick))
    if options.dtype:
        dtype = _DTYPES[options.dtype]
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    _write(state, options.output)
    size = sum(value.numel() * value.element_size() for value in state.values())
    if options.json:
        result = {"output": str(options.output), "tensors": len(state), "bytes": size}
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
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
