"""`pipebd check`: is this configuration going to work? Or: which block map would fit these two models?"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.commands.configuration import load_configuration
from lightning_pipebd.commands.pipeline_answer import describe_models
from lightning_pipebd.commands.text import format_columns
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.runtime.partition import boundary_shapes
from lightning_pipebd.runtime.suggestions import SuggestedPair, suggest_block_map
from lightning_pipebd.session_choice import require_module
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["make_parser", "run"]

_DESCRIPTION = """\
Look at a configuration without training: are the models cut as meant, do the shapes agree, does the trainer suit the
strategy? Prints a table of blocks. With --teacher, --student and --input: suggest a block map for two models.

exit codes: 0 no problem found, 1 a problem, which is printed with the way out
"""
_EPILOG = """\
examples:
  pipebd check --config examples/digits.yaml
  pipebd check --teacher torchvision.models.resnet34 --student torchvision.models.resnet18 --input 1,3,64,64
"""


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd check",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="configuration of `pipebd fit`")
    parser.add_argument("--teacher", help="import path of a class or function that makes the teacher")
    parser.add_argument("--student", help="import path of a class or function that makes the student")
    parser.add_argument("--input", help="shape of an input of both, such as 1,3,224,224")
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    parser.add_argument("others", nargs="*", metavar="-- ARGUMENTS", help="further arguments of `pipebd fit`")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    parser = make_parser()
    options = parser.parse_args(list(arguments))
    if not options.config and not (options.teacher and options.student and options.input):
        parser.error("give --config, or --teacher, --student and --input")
    try:
        text = _check(options) if options.config else _suggest(options)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        sys.stderr.write(f"Problem: {error}\n")
        return 1
    sys.stdout.write(f"{text}\n")
    return 0


def _suggest(options: argparse.Namespace) -> str:
    teacher, student = _make(options.teacher, "teacher"), _make(options.student, "student")
    shape = [int(size) for size in options.input.split(",")]
    pairs = suggest_block_map(teacher, student, torch.zeros(shape))
    if options.json:
        return json.dumps([pair._asdict() for pair in pairs], indent=2)
    return "\n".join(["block_map:", *(_pair_line(pair, is_last=pair is pairs[-1]) for pair in pairs)])


def _pair_line(pair: SuggestedPair, *, is_last: bool) -> str:
    student, teacher = ("x".join(map(str, shape[1:])) for shape in (pair.student_shape, pair.teacher_shape))
    back = "" if is_last else ", and the next block an input adapter back"
    shapes = f"{student} -> needs an adapter to {teacher}{back}" if pair.needs_adapter else student
    return f"  {pair.teacher or json.dumps('')}: {pair.student or json.dumps('')}  # {shapes}"


def _make(path: str, role: str) -> nn.Module:
    module, _, name = path.rpartition(".")
    model = getattr(import_module(module), name)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"`--{role}` must make a torch.nn.Module, but {path} makes a {type(model).__name__}.")
    return model


def _check(options: argparse.Namespace) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cli = load_configuration(options.config, options.others)
        module = require_module(cli.model)
        cli.trainer.strategy.connect(module)
        example = None
        if isinstance(module, BlockwiseDistillationModule):
            example = _find_example(module, cli)
            if example is not None:
                module.check_shapes(example)
        _check_trainer(cli.trainer)
    found = [str(warning.message) for warning in caught if "lightning_pipebd" in warning.filename]
    if isinstance(module, TeacherStudentModule):
        blocks, shapes = describe_models(module), "models are run when training begins"
    else:
        assert isinstance(module, BlockwiseDistillationModule)
        blocks = _describe_blocks(module, example)
        shapes = "shapes agree" if example is not None else "shapes not checked: no `example_input_array` and no data"
    if options.json:
        return json.dumps({"blocks": blocks, "warnings": found}, indent=2)
    table = format_columns([list(blocks[0]), *(list(map(str, block.values())) for block in blocks)])
    return "\n".join([table, *(f"Warning: {text}" for text in found), f"No problem found ({shapes})."])


def _find_example(module: BlockwiseDistillationModule, cli: LightningCLI) -> Any:
    """Give an input of the teacher: the module's own, or that of the first training batch."""
    if module.example_input_array is not None:
        return module.example_input_array
    if cli.datamodule is None:
        return None
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    return module.unpack_batch(batch)[0]


def _check_trainer(trainer: Trainer) -> None:
    preflight = getattr(trainer.strategy, "preflight", None)
    if preflight is not None:
        preflight(trainer)


def _describe_blocks(module: BlockwiseDistillationModule, example: Any) -> list[dict[str, Any]]:
    pairs = module.block_pairs
    shapes = boundary_shapes(pairs.teacher, example)[1:] if example is not None else [None] * module.num_blocks
    described = []
    for block, (name, shape) in enumerate(zip(pairs.names, shapes, strict=True)):
        teacher = list(pairs.teacher.blocks[block].parameters())
        student = pairs.parameters_of(block)
        described.append(
            {
                "block": name,
                "boundary per row": _describe_shape(shape),
                "teacher parameters": _count(teacher),
                "student parameters": _count(student),
                "share": f"{_count(student) / max(_count(teacher), 1):.0%}",
            }
        )
        if len(module.adapters):
            described[-1]["adapter parameters"] = _count(module.block_parameters(block)) - _count(student)
    return described


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _describe_shape(boundary: Any) -> str:
    leaves = [leaf for leaf in pytree.tree_leaves(boundary) if isinstance(leaf, Tensor)]
    return " + ".join("x".join(map(str, leaf.shape[1:])) or "scalar" for leaf in leaves) or "?"
