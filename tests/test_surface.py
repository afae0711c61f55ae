"""The names and parameters that users write; changing them is a deliberate act."""

from __future__ import annotations

from inspect import Parameter, signature

import pytest
from lightning.pytorch.strategies import StrategyRegistry

import lightning_pipebd
from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, TeacherStudentModule, Timeline

NAMES = [
    "BlockwiseDistillationModule",
    "CallableBlock",
    "Candidates",
    "CheckedCheckpointIO",
    "CheckpointError",
    "PartitionError",
    "PipeBDStrategy",
    "PipelinePlan",
    "Plan",
    "PlanError",
    "TeacherStudentModule",
    "Timeline",
    "format_plan",
    "layer_blocks",
    "load_plan",
    "parse_plan",
    "save_plan",
]

PARAMETERS = {
    PipeBDStrategy: [
        "plan=None",
        "*, exactness=None",
        "memory_limit=None",
        "costs=None",
        "teach_ahead=False",
        "trials=0",
        "replan=None",
        "max_in_flight=2",
        "num_micro_batches=None",
        "schedule=None",
        "split_backward=False",
        "process_group_backend=None",
        "timeout=0:30:00",
        "stall_timeout=0:02:00",
        "start_timeout=0:10:00",
        "**kwargs",
    ],
    TeacherStudentModule: [
        "teacher",
        "student",
        "block_map=None",
        "*, teacher_cuts=None",
        "student_cuts=None",
        "teacher_blocks=None",
        "student_blocks=None",
        "predictor=None",
        "momentum=None",
        "teacher_delay=0",
        "buffers=average",
        "views=False",
        "full_batch_loss=False",
        "on_nonfinite=raise",
    ],
    Timeline: ["path=timeline.json", "*, first_step=8", "num_steps=8", "plot=None", "report=None"],
    BlockwiseDistillationModule: [
        "teacher",
        "student",
        "block_map=None",
        "*, teacher_blocks=None",
        "student_blocks=None",
        "adapters=None",
        "input_adapters=None",
        "target_blocks=()",
        "block_losses=None",
        "momentum=None",
        "buffers=average",
        "on_nonfinite=raise",
        "compile=False",
        "example_input=None",
    ],
}

#: What users call on a module or override in theirs, beside Lightning's own hooks.
METHODS = {
    "block_loss": "(self, block, student_output, teacher_output, targets=None)",
    "unpack_batch": "(self, batch)",
    "trainable_parameters": "(self)",
    "block_parameters": "(self, block)",
    "block_buffers": "(self, block)",
    "block_key": "(self, block, what='loss')",
    "check_shapes": "(self, example_input)",
}


#: The same for a module with a loss of the whole student.
WHOLE_METHODS = {
    "loss": "(self, student_output, teacher_output, targets)",
    "unpack_batch": "(self, batch)",
    "teacher_inputs": "(self, inputs)",
    "teacher_momentum": "(self, num_updates)",
    "on_teacher_update": "(self)",
    "trainable_parameters": "(self)",
}


def written(parameters: list[Parameter]) -> list[str]:
    """Write parameters as in a call, the first keyword-only one after a star."""
    keyword_only = [parameter.name for parameter in parameters if parameter.kind is Parameter.KEYWORD_ONLY][:1]
    return [
        ("*, " if parameter.name in keyword_only else "**" if parameter.kind is Parameter.VAR_KEYWORD else "")
        + parameter.name
        + ("" if parameter.default is Parameter.empty else f"={parameter.default}")
        for parameter in parameters
    ]


def test_public_names() -> None:
    assert sorted(lightning_pipebd.__all__) == NAMES


@pytest.mark.parametrize("owner", PARAMETERS)
def test_constructor_parameters(owner: type) -> None:
    assert written(list(signature(owner).parameters.values())) == PARAMETERS[owner]


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        *((BlockwiseDistillationModule, *method) for method in METHODS.items()),
        *((TeacherStudentModule, *method) for method in WHOLE_METHODS.items()),
    ],
)
def test_methods(owner: type, name: str, expected: str) -> None:
    own = signature(getattr(owner, name))
    bare = [parameter.replace(annotation=Parameter.empty) for parameter in own.parameters.values()]
    assert str(own.replace(parameters=bare, return_annotation=Parameter.empty)) == expected


def test_the_strategy_is_known_by_name() -> None:
    assert StrategyRegistry["pipebd"]["strategy"] is PipeBDStrategy
    assert isinstance(StrategyRegistry.get("pipebd"), PipeBDStrategy)
