"""CUDA graphs reuse their memory: what must outlive the next call of a compiled block is copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd import BlockwiseDistillationModule
from lightning_pipebd.block_jobs import BlockJobs
from lightning_pipebd.lightning_internals.module import set_device
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.blocks import call_block
from lightning_pipebd.runtime.graph_memory import copy_gradients, copy_tensors, makes_graphs
from tests.helpers.toy import make_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    # What the compiler imports warns of torch's own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
NUM_BLOCKS = 3


class Graphs:
    """Gives blocks a memory as CUDA graphs have it, on a CPU: the next call overwrites what the last ones gave.

    As torch's manager of graphs does, it waits with that while a backward pass is pending. A gradient lies in the same
    memory, unless it was added to one that was there before.
    """

    def __init__(self) -> None:
        self._given: list[Tensor] = []
        self._is_pending = False
        self._is_fresh: dict[nn.Parameter, bool] = {}

    def compiled(self, block: nn.Module, name: str, options: Mapping[str, Any]) -> Callable[[Any], Any]:
        for parameter in block.parameters():
            if parameter.requires_grad:
                tensor: Any = parameter  # torch leaves the types of hooks out
                tensor.register_hook(lambda _, own=parameter: self._is_fresh.update({own: own.grad is None}))
                tensor.register_post_accumulate_grad_hook(self._keep_gradient)

        def call(boundary: Any) -> Any:
            if not self._is_pending:
                for tensor in self._given:
                    tensor.data.fill_(float("nan"))
                self._given.clear()
            output = call_block(block, boundary)
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            self._given += leaves
            self._is_pending |= any(leaf.requires_grad for leaf in leaves)
            return output

        return call

    def _keep_gradient(self, parameter: Tensor) -> None:
        self._is_pending = False
        if self._is_fresh[parameter]:  # type: ignore[index]
            assert parameter.grad is not None
            self._given.append(parameter.grad)


class OwnLoss(nn.Module):
    """A student block that gives its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.layer(x).pow(2).mean()
        return loss


class Distil(BlockwiseDistillationModule):
    shape = (6,)
    tokens = False

    def __init__(self, *, compile: bool) -> None:
        torch.manual_seed(11)

        def model() -> nn.Sequential:
            return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(NUM_BLOCKS)))

        teacher, student = model(), model()
        student[1] = OwnLoss()
        super().__init__(
            teacher,
            student,
            teacher_blocks=list(teacher),
            student_blocks=list(student),
            block_losses={1: lambda given, _: given},
            compile=compile,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.trainable_parameters(), lr=1e-2)


def fit_reference(module: Distil, num_accumulated: int) -> list[dict[str, float]]:
    """Train as plain Lightning does: one backward pass for all blocks."""
    trainer = make_trainer(accumulate_grad_batches=num_accumulated)
    trainer.fit(module, make_loader(module, 16, 4))
    return [{key: value.item() for key, value in trainer.callback_metrics.items()}]


def fit_by_blocks(module: Distil, num_accumulated: int) -> list[dict[str, float]]:
    """Train as a rank of a plan does: the teacher's blocks first, then one student block after the other."""
    module.trainer = make_trainer()
    jobs, optimizer = BlockJobs(module, Precision()), module.configure_optimizers()
    jobs.num_accumulated = num_accumulated
    seen: list[dict[str, float]] = []
    for number, batch in enumerate(make_loader(module, 16, 4)):
        boundaries = [batch[0]]
        for block in range(NUM_BLOCKS):
            boundaries.append(jobs.teach(block, boundaries[-1]))
        losses = {}
        for block in range(NUM_BLOCKS):
            ends = boundaries[block : block + 2]
            losses[str(block)] = jobs.learn(block, *ends, None, Rows(0, len(batch[0])), len(batch[0]))
            jobs.settle()
        seen.append({block: loss.item() for block, loss in losses.items()})
        if (number + 1) % num_accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return seen


def make_trainer(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.mark.parametrize("num_accumulated", [1, 2])
@pytest.mark.parametrize("fit", [fit_reference, fit_by_blocks])
def test_blocks_whose_memory_is_reused_train_the_same_student(
    monkeypatch: pytest.MonkeyPatch, fit: Callable[[Distil, int], Any], num_accumulated: int
) -> None:
    plain = Distil(compile=False)
    expected = fit(plain, num_accumulated)
    monkeypatch.setattr("lightning_pipebd.runtime.block_calls.compiled_block", Graphs().compiled)
    monkeypatch.setattr(BlockwiseDistillationModule, "uses_graphs", True)
    module = Distil(compile=True)
    assert fit(module, num_accumulated) == expected
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("fit", [fit_reference, fit_by_blocks])
def test_without_copies_it_would_be_another_one(
    monkeypatch: pytest.MonkeyPatch, fit: Callable[[Distil, int], Any]
) -> None:
    monkeypatch.setattr("lightning_pipebd.runtime.block_calls.compiled_block", Graphs().compiled)
    module = Distil(compile=True)
    try:
        fit(module, 1)
    except FloatingPointError:
        return
    assert any(value.isnan().any() for value in module.state_dict().values())


def test_losses_of_all_blocks_are_rated_though_their_memory_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(4, 6)
    expected = Distil(compile=False).rate_blocks(batch)
    monkeypatch.setattr("lightning_pipebd.runtime.block_calls.compiled_block", Graphs().compiled)
    monkeypatch.setattr(BlockwiseDistillationModule, "uses_graphs", True)
    assert torch.equal(torch.stack(Distil(compile=True).rate_blocks(batch)), torch.stack(expected))


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"mode": "reduce-overhead"},
            {"mode": "max-autotune"},
            {"options": {"triton.cudagraphs": True}},
            {"backend": "cudagraphs"},
            {"backend": lambda graph, inputs: graph.forward},
        ],
        ids=["reduce-overhead", "max-autotune", "an option of triton", "graphs alone", "a function"],
    )
    def test_what_may_make_graphs_is_copied_from(self, options: dict[str, Any]) -> None:
        assert makes_graphs(options)

    @pytest.mark.parametrize(
        "options",
        [
            None,
            {},
            {"fullgraph": True, "mode": None},
            {"mode": "default"},
            {"mode": "max-autotune-no-cudagraphs"},
            {"options": {"triton.cudagraphs": False, "max_autotune": True}},
            {"backend": "inductor"},
            {"backend": "aot_eager"},
        ],
        ids=repr,
    )
    def test_what_surely_makes_none_is_not(self, options: dict[str, Any] | None) -> None:
        assert not makes_graphs(options)

    def test_a_setting_of_the_whole_process_makes_them_too(self) -> None:
        from torch._inductor import config  # takes long to import, and is not wanted before

        with config.patch({"triton.cudagraphs": True}):
            assert makes_graphs({})
        assert not makes_graphs({})

    @pytest.mark.parametrize(
        ("compile", "device", "uses"),
        [
            ({"mode": "reduce-overhead"}, "cuda:0", True),
            ({"mode": "reduce-overhead"}, "cpu", False),
            (True, "cuda:0", False),
            (False, "cuda:0", False),
        ],
    )
    def test_only_a_gpu_has_graphs(self, compile: Any, device: str, uses: bool) -> None:
        module = BlockwiseDistillationModule(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), {"0": "0"})
        module.compile_options = dict(compile) if isinstance(compile, dict) else ({} if compile else None)
        set_device(module, torch.device(device))
        assert module.uses_graphs is uses

    def test_of_blocks_that_the_user_compiled_nobody_can_tell(self) -> None:
        student = nn.Sequential(nn.Linear(2, 2))
        student[0].compile(backend="eager")
        module = BlockwiseDistillationModule(nn.Sequential(nn.Linear(2, 2)), student, {"0": "0"})
        assert not module.uses_graphs
        set_device(module, torch.device("cuda:0"))
        assert module.uses_graphs


class TestCopies:
    def test_trees_keep_their_form_and_what_is_no_tensor(self) -> None:
        hidden = torch.zeros(2)
        copied = copy_tensors({"hidden": (hidden, [hidden]), "width": 7, "none": None})
        hidden.fill_(1.0)
        assert copied["width"] == 7
        assert copied["none"] is None
        assert [leaf.tolist() for leaf in (copied["hidden"][0], copied["hidden"][1][0])] == [[0.0, 0.0]] * 2

    def test_gradients_of_any_type_and_layout_are_the_same_numbers_elsewhere(self) -> None:
        channels_last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        gradients = [torch.randn(3), torch.randn(2, 2).half(), channels_last, torch.eye(3).to_sparse(), None]
        parameters = [nn.Parameter(torch.zeros(())) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.data = torch.zeros_like(gradient.to_dense())
                parameter.grad = gradient
        copy_gradients(parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            assert parameter.grad is not gradient
            assert torch.equal(parameter.grad.to_dense(), gradient.to_dense())
            assert gradient.is_sparse or parameter.grad.stride() == gradient.stride()
            assert gradient.is_sparse or parameter.grad.data_ptr() != gradient.data_ptr()
