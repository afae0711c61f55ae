"""The module of end-to-end training under plain Lightning, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pipebd import CallableBlock, PartitionError, TeacherStudentModule
from tests.helpers.whole_students import WIDTH, Byol, Contrast, Distil, WholeRun, perceptron, run_here

# What Lightning says of every module that is in eval() when training begins; a momentum teacher is, on purpose.
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")

QUIET = {"max_epochs": 1, "limit_train_batches": 4}


class Plain(TeacherStudentModule):
    """No predictor, no views: the rule and nothing else."""

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        return F.mse_loss(student_output, teacher_output - 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trainable_parameters(), lr=0.1)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_plain_lightning_follows_the_rule(delay: int, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers import whole_students

    made: list[Plain] = []

    def make() -> Plain:
        module = Plain(None, perceptron(8, 2), student_cuts=["0"], momentum=0.9, teacher_delay=delay)
        made.extend([copy.deepcopy(module), module])
        module.shape = (WIDTH,)
        return module

    monkeypatch.setitem(whole_students.WHOLE_STUDENTS, "plain", make)
    run = WholeRun(
        module="plain", shuffle=False, validate=False, trainer={"max_epochs": 1, "accumulate_grad_batches": accumulate}
    )
    trainer = run_here(run)
    before, after = made
    student, versions = before.student, [before.teacher]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    batches = list(trainer.train_dataloader)
    for index, (inputs, _) in enumerate(batches):
        teacher = versions[max(len(versions) - 1 - delay, 0)]
        torch.autograd.backward(F.mse_loss(student(inputs), teacher(inputs).detach() - 1) / accumulate)
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            optimizer.step()
            optimizer.zero_grad()
            versions.append(copy.deepcopy(versions[-1]))
            with torch.no_grad():
                for old, new in zip(versions[-1].parameters(), student.parameters(), strict=True):
                    old.copy_(0.9 * old + 0.1 * new)
    for mine, theirs in ((student, after.student), (versions[-1], after.averaged_teacher)):
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert float((one - other).detach().abs().max()) < 1e-12
    assert after.num_teacher_updates == len(versions) - 1


def test_a_frozen_teacher_stays_as_it_is_and_out_of_the_checkpoint() -> None:
    module = run_here(WholeRun(module="distil", trainer=QUIET)).lightning_module
    assert not any(key.startswith("teacher") for key in module.state_dict())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    assert not module.train().teacher.training


def test_a_momentum_teacher_is_in_the_checkpoint_in_eval_and_takes_no_gradient() -> None:
    module = Byol()
    assert {key.split(".")[0] for key in module.state_dict()} == {
        "student",
        "predictor",
        "teacher",
        "average",
        "centre",
    }
    module.train()
    assert module.student.training
    assert not module.teacher.training
    assert module.average is not None
    assert not module.average.training
    trained = {id(parameter) for parameter in module.trainable_parameters()}
    assert trained == {id(p) for p in [*module.student.parameters(), *module.predictor.parameters()]}


def test_the_momentum_follows_its_schedule_and_is_logged() -> None:
    trainer = run_here(WholeRun(module="byol", trainer=QUIET))
    assert trainer.lightning_module.num_teacher_updates == 4
    assert float(trainer.callback_metrics["train/momentum"]) == pytest.approx(1 - 0.3 / 4)


def test_terms_of_the_loss_are_logged_by_name() -> None:
    metrics = run_here(WholeRun(module="distil", trainer=QUIET)).callback_metrics
    assert {"train/loss", "train/soft", "train/loss_epoch", "train/soft_epoch"} <= metrics.keys()
    assert metrics["train/loss"] > metrics["train/soft"]


def test_what_follows_the_last_cut_is_a_block_of_its_own() -> None:
    module = Distil()
    assert (module.num_teacher_blocks, module.num_student_blocks) == (3, 4)
    inputs = torch.randn(2, WIDTH)
    boundary = inputs
    for block in range(module.num_teacher_blocks):
        boundary = module.teach(block, boundary)
    assert torch.equal(boundary, module.teacher(inputs))


def test_without_cuts_a_model_is_one_block() -> None:
    module = Plain(perceptron(8, 2), perceptron(8, 2))
    assert (module.num_teacher_blocks, module.num_student_blocks) == (1, 1)


def test_a_block_map_cuts_both_models() -> None:
    module = Plain(perceptron(8, 4), perceptron(8, 2), {"1": "0", "3": "1"})
    assert (module.num_teacher_blocks, module.num_student_blocks) == (3, 3)


class Resized(nn.Module):
    """Ends as segmentation models do: scores of the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.head(self.body(images)), size=images.shape[-2:])


def test_a_student_whose_end_needs_its_input_is_told_to_end_earlier() -> None:
    message = r"also needs .* of the model's input.*loss is of the student's output.*or end it earlier, by a module of"
    with pytest.raises(PartitionError, match=message):
        Plain(None, Resized(), student_cuts=["body", "head"], momentum=0.5)


def test_listed_blocks_are_copied_with_the_student() -> None:
    student = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    blocks = [student[0], CallableBlock(lambda hidden: student[1](hidden).tanh(), modules=[student[1]])]
    module = Plain(None, student, student_blocks=blocks, momentum=0.5)
    with torch.no_grad():
        student[1].weight.zero_()
    assert float(module.teach(1, module.teach(0, torch.ones(1, 3))).abs().sum()) > 0
    module.follow()
    assert module.teacher[1].weight.abs().sum() > 0


def test_the_average_without_delay_is_the_teacher_itself() -> None:
    delayed, prompt = Byol(1), Byol(0)
    assert delayed.averaged_teacher is delayed.average
    assert prompt.averaged_teacher is prompt.teacher


def test_a_loss_has_to_be_defined() -> None:
    module = TeacherStudentModule(perceptron(8, 2), perceptron(8, 2))
    with pytest.raises(NotImplementedError, match="must define `loss"):
        module.loss(None, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "`teacher` must be a model unless it has momentum"),
        ({"teacher_delay": 1}, "`teacher_delay` must be 0, or 1 for a teacher with momentum, but is 1"),
        ({"teacher": None, "momentum": 0.9, "teacher_delay": 2}, "`teacher_delay` must be 0, or 1"),
        ({"teacher": None, "momentum": 1.5}, "`momentum` must lie between 0 and 1, but is 1.5"),
        ({"teacher": None, "momentum": 0.5, "buffers": "mean"}, "`buffers` must be 'average', 'copy' or 'leave'"),
        ({"momentum": 0.5}, "must have the student's blocks, tensor by tensor"),
        ({"block_map": {"0": "0"}, "student_cuts": ["0"]}, "must be cut in one way"),
        ({"teacher_blocks": []}, "must be cut in one way"),
        ({"student_cuts": ["9"]}, "`9` must be the path of a module of the student"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"teacher": perceptron(9, 2), "student": perceptron(8, 2), **options}
    with pytest.raises((ValueError, PartitionError), match=message):
        Plain(**arguments)


def test_a_listed_student_needs_a_listed_teacher() -> None:
    student = perceptron(8, 2)
    with pytest.raises(PartitionError, match="`teacher_blocks` must list the teacher's blocks"):
        Plain(perceptron(8, 2), student, student_blocks=list(student))


def test_models_do_not_share_parameters() -> None:
    student = perceptron(8, 2)
    with pytest.raises(PartitionError, match="must not share parameters with `teacher`"):
        Plain(nn.Sequential(*student), student)


def test_terms_include_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distil, "loss", lambda *_: {"soft": torch.zeros(())})
    with pytest.raises(ValueError, match="`loss` must give the key 'loss', but gave soft"):
        run_here(WholeRun(module="distil", trainer=QUIET))


def test_a_contrastive_module_says_that_it_needs_the_full_batch() -> None:
    assert Contrast().full_batch_loss
