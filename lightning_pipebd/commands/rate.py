"""`pipebd rate`: which candidate of every place is best, and which fit a number of parameters together?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from lightning_pipebd.commands.configuration import load_configuration
from lightning_pipebd.commands.text import format_columns
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.selection import select_candidates
from lightning_pipebd.preflight import require_module
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["make_parser", "run"]

_DESCRIPTION = """\
Rate the candidates of every place of a trained student on validation data: each candidate's loss against the teacher's
block, and its parameters. Chooses the candidates whose losses have the smallest sum, within --max-parameters. A whole
student (TeacherStudentModule) has no candidates.

exit codes: 0 rated, 1 nothing to rate, or the candidates are too large
"""
_EPILOG = """\
examples:
  pipebd rate --config config.yaml --checkpoint last.ckpt
  pipebd rate --config config.yaml --checkpoint last.ckpt --max-parameters 50000
"""


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd rate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="configuration of `pipebd fit`")
    parser.add_argument("--checkpoint", required=True, help="checkpoint that the fit has written")
    parser.add_argument("--batches", type=int, default=16, help="validation batches to rate on (default 16)")
    parser.add_argument("--max-parameters", type=int, help="of all chosen candidates together; default no limit")
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    parser.add_argument("others", nargs="*", metavar="-- ARGUMENTS", help="further arguments of `pipebd fit`")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    options = make_parser().parse_args(list(arguments))
    try:
        scores, chosen = _rate(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(_describe(scores, chosen, is_json=options.json))
    return 0


def _rate(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    cli = load_configuration(options.config, options.others)
    if isinstance(cli.model, TeacherStudentModule):
        raise ValueError(
            "`rate` must have candidates to choose from, but a whole student has none: its blocks have one loss "
            "together, so no block can be rated by itself. Compare students by what `validation_step` logs "
            "(`pipebd validate`), or make a BlockwiseDistillationModule with a `Candidates` module at a place."
        )
    module = require_module(cli.model)
    if not any(module.block_pairs.candidates):
        raise ValueError(
            "The student must have a place with candidates, but has none. Put a `Candidates` module in it."
        )
    module.load_state_dict(torch.load(options.checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    if cli.datamodule is None:
        raise ValueError("The configuration must name a data module (`data`), but has none.")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("validate")
    module.eval()
    rated = [module.rate_blocks(batch) for batch in islice(cli.datamodule.val_dataloader(), options.batches)]
    if not rated:
        raise ValueError("`val_dataloader` must yield a batch, but is empty.")
    means = torch.tensor(rated, dtype=torch.float64).mean(0).tolist()
    scores = _score(module, means)
    places = list(dict.fromkeys(score["place"] for score in scores))
    by_place = [[score for score in scores if score["place"] == place] for place in places]
    numbers = select_candidates(
        [[score["loss"] for score in place] for place in by_place],
        [[score["parameters"] for score in place] for place in by_place],
        options.max_parameters,
    )
    return scores, dict(zip(places, numbers, strict=True))


def _score(module: BlockwiseDistillationModule, means: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "place": candidate.place,
            "candidate": candidate.number,
            "loss": mean,
            "parameters": sum(parameter.numel() for parameter in module.block_parameters(block)),
        }
        for block, (candidate, mean) in enumerate(zip(module.block_pairs.candidates, means, strict=True))
        if candidate is not None
    ]


def _describe(scores: list[dict[str, Any]], chosen: dict[str, int], *, is_json: bool) -> str:
    if is_json:
        return json.dumps({"candidates": scores, "chosen": chosen}, indent=2) + "\n"
    rows = [["place", "candidate", "loss", "parameters", "chosen"]]
    for score in scores:
        mark = "<--" if chosen[score["place"]] == score["candidate"] else ""
        numbers = [str(score["candidate"]), f"{score['loss']:.6g}", str(score["parameters"])]
        rows.append([score["place"], *numbers, mark])
    picks = " ".join(f"--pick {place}={number}" for place, number in chosen.items())
    return f"{format_columns(rows)}\nThe student of these alone: pipebd export CHECKPOINT OUTPUT {picks}\n"
