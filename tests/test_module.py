"""The module by itself: what is trained, what is frozen, and that blocks leave each other alone."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pipebd import BlockwiseDistillationModule, PartitionError
from tests.helpers.toy import LinearModule, make_loader, make_module

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Pair(BlockwiseDistillationModule):
    """Any models, trained by plain gradient descent."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trainable_parameters(), lr=0.1)


def linear(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))


def rows() -> DataLoader[Any]:
    return make_loader(LinearModule, 8, 4)


def fit(module: BlockwiseDistillationModule, data: Any = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{**defaults, **settings})
    # A list is a list of batches here; a trainer would take it for a list of loaders.
    trainer.fit(module, DataLoader(data, batch_size=None) if isinstance(data, list) else data or rows())
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def is_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# The teacher.


def test_teacher_is_no_part_of_what_is_trained_and_saved() -> None:
    module = make_module("conv")
    own = {id(parameter) for parameter in module.parameters()}
    assert not own & {id(parameter) for parameter in module.teacher.parameters()}
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_teacher_stays_in_eval() -> None:
    module = make_module("conv")
    assert not any(part.training for part in module.train().teacher.modules())
    assert all(part.training for part in module.student.modules())


def test_teacher_is_the_same_after_training() -> None:
    module = make_module("conv")
    before = weights(module.teacher)
    fit(module, make_loader(module, 8, 4))
    assert_equal(weights(module.teacher), before)
    assert not any(part.training for part in module.teacher.modules())


def test_teacher_follows_the_module() -> None:
    module = make_module("conv").to(torch.float64)
    assert {value.dtype for value in module.teacher.parameters()} == {torch.float64}
    assert {value.device.type for value in module.to("meta").teacher.parameters()} == {"meta"}


def test_freezing_and_unfreezing_the_module_leaves_the_teacher_frozen() -> None:
    module = make_module("linear")
    module.freeze()
    module.unfreeze()
    assert all(parameter.requires_grad for parameter in module.student.parameters())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_forward_is_the_students() -> None:
    module = make_module("linear")
    inputs = torch.randn(3, 6)
    assert_equal(module(inputs), module.student(inputs))


# Copies.


@pytest.mark.parametrize("name", ["conv", "dropout", "transformer"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_trains_by_itself_to_the_same_student(name: str, duplicate: Any) -> None:
    module = make_module(name)
    before, twin = weights(module.student), duplicate(module)
    torch.manual_seed(5)
    fit(twin, make_loader(module, 8, 4))
    assert_equal(weights(module.student), before)
    torch.manual_seed(5)
    fit(module, make_loader(module, 8, 4))
    assert_equal(weights(twin.student), weights(module.student))
    assert not is_equal(weights(module.student), before)


def test_a_copy_of_a_trained_module_goes_on() -> None:
    module = make_module("linear")
    fit(module)
    twin = copy.deepcopy(module)
    before = weights(module.student)
    fit(twin)
    assert_equal(weights(module.student), before)
    assert not is_equal(weights(twin.student), before)


# Losses and batches.


class Labelled(Pair):
    """Notes what `block_loss` is given."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(linear(6, 6, 5), linear(6, 6, 5), {"0": "0", "1": "1"}, **arguments)
        self.given: list[tuple[int, tuple[int, ...], tuple[int, ...], bool]] = []

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        self.given.append((block, tuple(student_output.shape), tuple(teacher_output.shape), targets is not None))
        assert not teacher_output.requires_grad
        return super().block_loss(block, student_output, teacher_output, targets)


@pytest.mark.parametrize("target_blocks", [["1"], [1]])
def test_block_loss_gets_labels_for_the_blocks_that_want_them(target_blocks: list[str | int]) -> None:
    module = Labelled(target_blocks=target_blocks)
    fit(module, max_steps=1)
    assert module.given == [(0, (4, 6), (4, 6), False), (1, (4, 5), (4, 5), True)]


def test_blocks_are_trained_on_the_teachers_boundaries() -> None:
    module = Pair(linear(6, 6, 5), linear(6, 6, 5), {"0": "0", "1": "1"})
    inputs = torch.randn(4, 6)
    boundary = module.teacher[0](inputs)
    first = nn.functional.mse_loss(module.student[0](inputs), boundary)
    second = nn.functional.mse_loss(module.student[1](boundary), module.teacher[1](boundary))
    trainer = fit(module, [inputs], max_steps=1)
    assert trainer.callback_metrics["train/block/00/loss"] == first
    assert trainer.callback_metrics["train/block/01/loss"] == second
    assert trainer.callback_metrics["train/loss"] == first + second


def test_block_losses_are_chosen_by_name_index_or_function() -> None:
    def absolute(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()

    models = linear(6, 6, 6, 5), linear(6, 6, 6, 5)
    paths = {"0": "0", "1": "1", "2": "2"}
    module = Pair(*models, paths, block_losses={"0": absolute, 2: "kl"})
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    assert_equal(module.block_loss(0, student, teacher), absolute(student, teacher))
    assert_equal(module.block_loss(1, student, teacher), nn.functional.mse_loss(student, teacher))
    logits = [nn.functional.log_softmax(tensor, -1) for tensor in (student, teacher)]
    divergence = nn.functional.kl_div(*logits, log_target=True, reduction="batchmean")
    torch.testing.assert_close(module.block_loss(2, student, teacher), divergence)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must name one of mse, soft_cross_entropy, kl, but names 'l1'"):
        Pair(linear(6, 5), linear(6, 5), {"0": "0"}, block_losses={"0": "l1"})


@pytest.mark.parametrize("key", ["features.9", 2, -1])
@pytest.mark.parametrize("argument", ["block_losses", "adapters", "input_adapters"])
def test_a_block_that_does_not_exist_is_refused(argument: str, key: str | int) -> None:
    values = {key: "mse" if argument == "block_losses" else nn.Linear(1, 1)}
    with pytest.raises(ValueError, match=f"`{argument}` must name blocks .* but names {key!r}"):
        Pair(linear(6, 6, 5), linear(6, 6, 5), {"0": "0", "1": "1"}, **{argument: values})


@pytest.mark.parametrize(
    ("batch", "inputs", "labels"),
    [
        ((1, 2), 1, 2),
        ([1, 2], 1, 2),
        ((1,), 1, None),
        ([1], 1, None),
        ((1, 2, 3), (1, 2, 3), None),
        ({"x": 1, "y": 2}, {"x": 1, "y": 2}, None),
        (1, 1, None),
    ],
)
def test_a_pair_is_inputs_and_labels_and_anything_else_is_input(batch: Any, inputs: Any, labels: Any) -> None:
    assert make_module("linear").unpack_batch(batch) == (inputs, labels)


class Unpacking(Pair):
    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return batch["pixels"], batch["digit"]


def test_other_batches_are_unpacked_by_the_user() -> None:
    module = Unpacking(linear(6, 5), linear(6, 5), {"0": "0"}, target_blocks=["0"])
    before = weights(module.student)
    fit(module, [{"digit": torch.zeros(4), "pixels": torch.randn(4, 6), "name": ["a"] * 4}])
    assert not is_equal(weights(module.student), before)


# Adapters.


def adapted() -> Pair:
    """A narrower student whose activations two adapters bring to the teacher's widths and back."""
    torch.manual_seed(11)
    return Pair(
        linear(6, 8, 5),
        linear(6, 3, 5),
        {"0": "0", "1": "1"},
        adapters={"0": nn.Linear(3, 8)},
        input_adapters={1: nn.Linear(8, 3)},
        example_input=torch.zeros(2, 6),
    )


def test_adapters_are_trained_with_their_blocks() -> None:
    module = adapted()
    before = weights(module)
    fit(module)
    after = weights(module)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert [len(module.block_parameters(block)) for block in range(2)] == [4, 4]


def test_adapters_are_saved_but_are_no_part_of_the_student() -> None:
    module = adapted()
    prefixes = {name.rpartition(".")[0] for name in module.state_dict()}
    assert prefixes == {"student.0", "student.1", "adapters.output_0", "adapters.input_1"}
    assert module(torch.randn(2, 6)).shape == (2, 5)


def test_parameters_of_a_block_are_found_behind_a_wrapper() -> None:
    module = Pair(linear(2, 2, 2), linear(2, 2, 2), {"0": "0", "1": "1"})
    before = module.block_parameters(0)
    module.student[0] = torch.compile(module.student[0])  # type: ignore[operator]  # a Sequential
    assert all(found is own for found, own in zip(module.block_parameters(0), before, strict=True))


def test_buffers_of_a_block_are_those_of_its_adapters_too() -> None:
    norm = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    module = Pair(linear(6, 8), linear(6, 3), {"0": "0"}, adapters={"0": norm})
    assert len(module.block_buffers(0)) == 3


# Shapes.


def test_a_wrong_shape_names_the_boundary_both_shapes_and_the_way_out() -> None:
    with pytest.raises(PartitionError, match=r"`0` -> `0` must have one shape.*\(2, 8\).*\(2, 3\).*adapter"):
        Pair(linear(6, 8, 5), linear(6, 3, 5), {"0": "0", "1": "1"}, example_input=torch.zeros(2, 6))


def test_a_wrong_shape_without_an_example_is_refused_by_the_first_batch() -> None:
    module = Pair(linear(6, 8), linear(6, 3), {"0": "0"})
    with pytest.raises(ValueError, match=r"must have the teacher's shape, but has \(4, 3\) .* \(4, 8\).*adapter"):
        fit(module)


def test_looking_at_shapes_changes_nothing() -> None:
    module = make_module("dropout")
    before, state = weights(module.student), torch.get_rng_state()
    module.check_shapes(torch.zeros(2, 3, 8, 8))
    assert_equal(weights(module.student), before)
    assert_equal(torch.get_rng_state(), state)


# What the models may not be.


def test_a_student_that_shares_parameters_with_the_teacher_is_refused() -> None:
    teacher = linear(6, 6, 5)
    with pytest.raises(PartitionError, match=r"must not share parameters .* shares 0\.weight, 0\.bias\..*deepcopy"):
        Pair(teacher, nn.Sequential(teacher[0], nn.Linear(6, 5)), {"0": "0", "1": "1"})


def test_parameters_behind_the_last_boundary_warn() -> None:
    with pytest.warns(UserWarning, match=r"2 parameters of `student` lie behind .*: 1\.weight, 1\.bias\. Add"):
        Pair(linear(6, 6, 5), linear(6, 6, 5), {"0": "0"})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"teacher_blocks": [nn.Linear(1, 1)]},
        {"block_map": {"0": "0"}, "teacher_blocks": [nn.Linear(1, 1)], "student_blocks": [nn.Linear(1, 1)]},
    ],
)
def test_blocks_must_be_given_in_one_way(arguments: dict[str, Any]) -> None:
    with pytest.raises(PartitionError, match="must be given, or both `teacher_blocks` and `student_blocks`"):
        Pair(linear(6, 5), linear(6, 5), **arguments)


# Blocks leave each other alone.


def test_an_operation_in_place_at_the_start_of_a_block_changes_no_boundary() -> None:
    def model() -> nn.Sequential:
        layers = (nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Hardtanh(inplace=True))
        return nn.Sequential(*layers, nn.Linear(6, 5))

    torch.manual_seed(11)
    module = Pair(model(), model(), {"0": "0", "2": "2", "4": "4"})
    inputs = torch.randn(4, 6)
    boundaries = [inputs.clone()]
    for index in (0, 2, 4):
        boundaries.append(module.teacher[max(0, index - 1) : index + 1](boundaries[-1].clone()))
    seen: list[Tensor] = []
    module.block_loss = lambda block, student, teacher, targets=None: (  # type: ignore[method-assign]  # a spy
        seen.append(teacher.clone()) or nn.functional.mse_loss(student, teacher)
    )
    fit(module, [inputs, inputs.clone()], max_steps=2)
    assert_equal(seen, boundaries[1:] * 2)


def test_a_loss_that_changes_the_teachers_output_is_refused() -> None:
    class InPlace(LinearModule):
        def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
            return nn.functional.mse_loss(student_output, teacher_output.div_(2))

    with pytest.raises(RuntimeError, match="The loss of block 0 and its input adapter must leave the teacher's bound"):
        fit(InPlace(), [torch.randn(4, 6)], max_steps=1)


def test_an_input_adapter_that_changes_the_teachers_boundary_is_refused() -> None:
    adapter = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5))
    module = Pair(linear(6, 5, 5), linear(6, 5, 5), {"0": "0", "1": "1"}, input_adapters={"1": adapter})
    with pytest.raises(RuntimeError, match=r"The loss of block 1 .* `inplace=False`"):
        fit(module, [torch.randn(4, 6)], max_steps=1)


def test_blocks_are_rated_in_inference_mode_and_trained_afterwards() -> None:
    module = make_module("conv")
    batch = next(iter(make_loader(module, 4, 4)))
    with torch.inference_mode():
        rated = module.rate_blocks(tuple(leaf.clone() for leaf in batch))
    assert all(loss.isfinite() for loss in rated)
    fit(module, [batch], max_steps=1)


def test_a_block_that_begins_to_change_its_input_is_reported() -> None:
    class Moody(nn.Module):
        is_rude = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if self.is_rude else x * 2

    moody = Moody()
    module = Pair(nn.Sequential(moody, nn.Linear(6, 5)), linear(6, 5), {"1": "0"})
    inputs = torch.ones(2, 6)
    module.teach(0, inputs)
    moody.is_rude = True
    with pytest.raises(RuntimeError, match="teacher block 0 changed its input in place now, but did not"):
        module.teach(0, inputs)


def test_random_streams_of_blocks_do_not_touch_the_global_generators() -> None:
    module = make_module("dropout")
    fit(module, make_loader(module, 8, 4), max_steps=1)
    state = torch.get_rng_state()
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = module.teach(0, inputs)
    losses = [module.imitate(0, inputs, target, None, epoch=0, batch_idx=index) for index in (0, 1, 0)]
    assert_equal(torch.get_rng_state(), state)
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def test_rows_that_start_elsewhere_draw_other_numbers() -> None:
    module = make_module("dropout")
    fit(module, make_loader(module, 8, 4), max_steps=1)
    inputs = torch.randn(4, 3, 8, 8)
    target = module.teach(0, inputs)
    first, second = (module.imitate(0, inputs, target, None, epoch=0, batch_idx=0, first_row=row) for row in (0, 4))
    assert first != second


def test_the_seed_of_the_streams_is_that_of_the_run_and_kept_in_checkpoints() -> None:
    torch.manual_seed(77)
    module, checkpoint = make_module("linear"), {}
    module.random_seed = 77
    module.on_save_checkpoint(checkpoint)
    other = make_module("linear")
    other.on_load_checkpoint(checkpoint)
    assert other.random_seed == 77
    torch.manual_seed(78)
    assert LinearModule().random_seed == 78


@pytest.mark.parametrize(("algorithm", "expected"), [("norm", [0.5, 0.25]), ("value", [0.5 * 30**0.5, 0.25])])
def test_gradients_are_clipped_block_by_block(algorithm: str, expected: list[float]) -> None:
    module = Pair(linear(6, 5, 5), linear(6, 5, 5), {"0": "0", "1": "1"})
    weight, other = module.student[0].weight, module.student[1].weight
    weight.grad, other.grad = torch.full_like(weight, 3.0), torch.zeros_like(other)
    other.grad[0, 0] = 0.25
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.trainer = Trainer(logger=False, accelerator="cpu")
    module.configure_gradient_clipping(optimizer, 0.5, algorithm)
    assert [weight.grad.norm().item(), other.grad.norm().item()] == pytest.approx(expected, rel=1e-4)


def test_gradients_that_the_optimizer_does_not_use_count_for_nothing() -> None:
    module = Pair(linear(6, 5, 5), linear(6, 5, 5), {"0": "0", "1": "1"})
    trained, left_out = module.student[0].bias, module.student[0].weight
    trained.grad, left_out.grad = torch.full_like(trained, 0.1), torch.full_like(left_out, 100.0)
    module.trainer = Trainer(logger=False, accelerator="cpu")
    module.configure_gradient_clipping(torch.optim.SGD([trained], lr=0.1), 0.5, "norm")
    assert_equal([trained.grad, left_out.grad], [torch.full_like(trained, 0.1), torch.full_like(left_out, 100.0)])


def test_gradients_with_a_loss_scale_are_not_clipped() -> None:
    class Fused(LinearModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.trainable_parameters(), fused=True)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"`gradient_clip_val` must be left out .* AdamW\(fused=True\)"):
        fit(Fused(), plugins=[plugin], gradient_clip_val=0.5)


def test_no_clipping_leaves_gradients_alone() -> None:
    module = make_module("linear")
    parameter = next(module.student.parameters())
    parameter.grad = torch.full_like(parameter, 3.0)
    module.configure_gradient_clipping(torch.optim.SGD(module.parameters(), lr=0.1), None, None)
    assert_equal(parameter.grad, torch.full_like(parameter, 3.0))


# Names.


@pytest.mark.parametrize(("num_blocks", "key"), [(2, "train/block/01/loss"), (101, "train/block/001/loss")])
def test_keys_sort_as_blocks_do(num_blocks: int, key: str) -> None:
    models = [nn.Sequential(*(nn.Linear(1, 1) for _ in range(num_blocks))) for _ in range(2)]
    blocks = [list(model) for model in models]
    module = Pair(*models, teacher_blocks=blocks[0], student_blocks=blocks[1])
    assert module.block_key(1) == key
