"""Compiled blocks: the same student, under the same names, wherever they run."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd import BlockwiseDistillationModule
from lightning_pipebd.runtime.compiling import compiled_block
from tests.helpers.resuming import states_of
from tests.helpers.scenarios import MakeTrainer, on_one_process, under_plan
from tests.helpers.toy import make_loader
from tests.helpers.training import assert_same_checkpoint

# What the compiler imports warns of torch's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NUM_BLOCKS = 2
EAGER: dict[str, Any] = {"backend": "eager", "fullgraph": True}


def make_model() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(NUM_BLOCKS)))


class Distil(BlockwiseDistillationModule):
    shape = (6,)
    tokens = False

    def __init__(self, compile: bool | Mapping[str, Any] = False, student: nn.Module | None = None) -> None:
        torch.manual_seed(11)
        teacher, fresh = make_model(), make_model()
        paths = {str(index): str(index) for index in range(NUM_BLOCKS)}
        super().__init__(teacher, fresh if student is None else student, paths, compile=compile)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.trainable_parameters(), lr=1e-2)


def fit(make_trainer: MakeTrainer, module: Distil) -> dict[str, Any]:
    trainer = make_trainer()
    trainer.fit(module, make_loader(module, 20, 6))
    return states_of(trainer, module)


class TestOptions:
    def test_no_option_of_the_compiler_is_made_up(self) -> None:
        with pytest.raises(ValueError, match=r"`compile` must hold keyword arguments .* but holds \['speed'\]"):
            Distil({"speed": 11})

    def test_another_kind_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"`compile` must be True, False or keyword arguments .* but is 'fast'"):
            Distil("fast")  # type: ignore[arg-type]

    def test_nothing_is_compiled_unless_asked_for(self) -> None:
        assert Distil().compile_options is None
        assert Distil(compile=True).compile_options == {}


class TestCompiledBlock:
    def test_blocks_of_one_class_are_compiled_each_for_itself(self) -> None:
        compiled: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            compiled.append(graph)
            return graph.forward

        num_blocks = 9  # more than the compiler keeps versions of one code
        blocks = [nn.Linear(4, 4 + index) for index in range(num_blocks)]
        calls = [compiled_block(block, f"block_{index}", {"backend": backend}) for index, block in enumerate(blocks)]
        for _ in range(2):
            for call, block in zip(calls, blocks, strict=True):
                assert torch.equal(call(torch.ones(2, 4)), block(torch.ones(2, 4)))
        assert len(compiled) == num_blocks

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler needs one for C++")
    def test_default_compiler_gives_the_blocks_values(self) -> None:
        alone = {"options": {"compile_threads": 1}}  # workers would outlive the test
        block = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        with torch.no_grad():
            found = compiled_block(block, "teacher_block_0", alone)(torch.ones(3, 4))
            torch.testing.assert_close(found, block(torch.ones(3, 4)), rtol=1e-5, atol=1e-6)


class TestModule:
    def test_names_are_those_of_the_models(self) -> None:
        plain, compiled = Distil(), Distil(EAGER)
        compiled.teach(0, torch.ones(2, 6))
        assert list(compiled.state_dict()) == list(plain.state_dict())

    def test_copies_compile_their_own_blocks(self) -> None:
        module = Distil(EAGER)
        module.eval()
        boundary = torch.ones(2, 6)
        before = module.teach(0, boundary)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            with torch.no_grad():
                copied.teacher[0][0].weight.zero_()
            assert not torch.equal(copied.teach(0, boundary), before)
            assert torch.equal(module.teach(0, boundary), before)


def fit_compiled(make_trainer: MakeTrainer, options: Mapping[str, Any] | bool) -> dict[str, Any]:
    return fit(make_trainer, Distil(options))


def fit_and_resume(make_trainer: MakeTrainer, path: str) -> dict[str, Any]:
    module = Distil({"backend": "aot_eager"})
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, make_loader(module, 20, 6))
    trainer.save_checkpoint(path)
    resumed = Distil({"backend": "aot_eager"})
    trainer = make_trainer()
    trainer.fit(resumed, make_loader(resumed, 20, 6), ckpt_path=path)
    return states_of(trainer, resumed)


class OwnCompiled(Distil):
    """The student's blocks are the user's own business: one compiled in place, one by a wrapper."""

    def __init__(self) -> None:
        torch.manual_seed(11)
        make_model()
        student = make_model()
        student[0].compile(**EAGER)
        student[1] = torch.compile(student[1], **EAGER)
        super().__init__(student=student)


def fit_own(make_trainer: MakeTrainer) -> dict[str, Any]:
    return fit(make_trainer, OwnCompiled())


@pytest.mark.spawn
def test_compiled_and_resumed_under_a_plan_it_is_the_student_of_one_process(tmp_path: Path) -> None:
    expected = on_one_process(fit_compiled, False)
    path = tmp_path / "half.ckpt"
    # These backends keep the operations and their order, hence the bits; torch's default fuses and reorders.
    assert_same_checkpoint(expected, under_plan(fit_and_resume, str(path), plan="0|1")[0])
    names = torch.load(path, weights_only=True)["state_dict"]
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.spawn
def test_blocks_that_the_user_compiled_train_under_a_plan_as_in_one_process() -> None:
    one, many = on_one_process(fit_own), under_plan(fit_own, plan="0|1")[0]
    assert_same_checkpoint(one, many)
    plain = on_one_process(fit_compiled, False)
    renamed = {name.replace("._orig_mod", ""): value for name, value in one["module"].items()}
    assert_same_checkpoint(plain["module"], renamed)
