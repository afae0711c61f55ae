"""Pipelined blockwise distillation for PyTorch Lightning: ``Trainer(strategy="pipebd", devices=4)``."""

from lightning_pipebd.checkpoint_io import CheckedCheckpointIO, CheckpointError
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.plan import Plan, PlanError
from lightning_pipebd.planning.plan_text import format_plan, parse_plan
from lightning_pipebd.plans import load_plan, save_plan
from lightning_pipebd.runtime.candidates import Candidates
from lightning_pipebd.runtime.layer_blocks import layer_blocks
from lightning_pipebd.runtime.partition import CallableBlock, PartitionError
from lightning_pipebd.strategy import PipeBDStrategy
from lightning_pipebd.teacher_student import TeacherStudentModule
from lightning_pipebd.timeline import Timeline

__all__ = [
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
__version__ = "0.1.0"
