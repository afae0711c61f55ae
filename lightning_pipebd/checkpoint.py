"""State that is spread over ranks, and the one ordinary Lightning checkpoint that it makes up.

Every rank learns some blocks, keeps the optimizer state of these alone, and holds stale copies of the others. A
checkpoint has the layout that plain Lightning writes on one device: the plan leaves no trace in it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.runtime.transport import Lane, Message, Transport

__all__ = ["PrunedOptimizer", "fingerprint", "hand_over", "share_from_zero", "synchronise", "synchronise_models"]


class PrunedOptimizer:
    """The user's optimizer, reduced to the parameters of this rank; knows the layout that it had.

    Empty groups are kept: group numbers, and with them learning-rate schedules, stay those of one device.

    Args:
        optimizer: Made by the user over all parameters; its groups shrink.
        is_local: Whether this rank updates a parameter.
        is_owned: Whether this rank's state of a parameter goes into checkpoints; true on exactly one rank.

    Attributes:
        optimizer: The optimizer.
        dtypes: Types of all parameters that there were.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        is_local: Callable[[nn.Parameter], bool],
        is_owned: Callable[[nn.Parameter], bool],
    ) -> None:
        self.optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._group_sizes = [len(group) for group in self._groups]
        self.dtypes = [parameter.dtype for group in optimizer.param_groups for parameter in group["params"]]
        self._local: list[int] = []
        self._owned: set[int] = set()
        number = 0
        for group in optimizer.param_groups:
            kept = []
            for parameter in group["params"]:
                if is_local(parameter):
                    self._local.append(number)
                    kept.append(parameter)
                else:
                    optimizer.state.pop(parameter, None)
                if is_owned(parameter):
                    self._owned.add(number)
                number += 1
            group["params"] = kept
        vars(optimizer)["add_param_group"] = _refuse_group

    @property
    def local_numbers(self) -> list[int]:
        """For each parameter that is left, its number among all that there were."""
        return self._local

    def restore(self) -> None:
        """Give the optimizer all its parameters back; it has the state of this rank's alone."""
        vars(self.optimizer).pop("add_param_group", None)
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = list(parameters)

    def state(self, transport: Transport) -> dict[str, Any]:
        """**Collective** over all ranks: give the state in the layout of one device; complete on rank 0 only."""
        local = self.optimizer.state_dict()
        own = {self._local[index]: state for index, state in local["state"].items()}
        own = {number: state for number, state in own.items() if number in self._owned}
        if transport.rank:
            # To host memory: rank 0's device has no room for the states of all blocks.
            own = pytree.tree_map_only(Tensor, Tensor.cpu, own)
            transport.send(Message((0, 0, 0, 0), own), 0, Lane.STATE).wait()
        else:
            for peer in range(1, transport.num_ranks):
                own |= transport.recv(peer, Lane.STATE).tree
        numbers = iter(range(sum(self._group_sizes)))
        groups = [
            {**group, "params": [next(numbers) for _ in range(size)]}
            for group, size in zip(local["param_groups"], self._group_sizes, strict=True)
        ]
        return {"state": dict(sorted(own.items())), "param_groups": groups}

    def load(self, state: dict[str, Any]) -> None:
        """Take this rank's part of a state in the layout of one device.

        Raises:
            ValueError: The state has other groups than the optimizer.
        """
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != self._group_sizes:
            msg = (
                f"`optimizer_states` must have parameter groups of {self._group_sizes} parameters, but the checkpoint "
                f"has {sizes}. Resume with the `configure_optimizers` that the checkpoint was written with."
            )
            raise ValueError(msg)
        local = {number: index for index, number in enumerate(self._local)}
        groups = [
            {**group, "params": [local[number] for number in group["params"] if number in local]}
            for group in state["param_groups"]
        ]
        own = {local[number]: entry for number, entry in state["state"].items() if number in local}
        self.optimizer.load_state_dict({"state": own, "param_groups": groups})


def _refuse_group(param_group: dict[str, Any]) -> None:
    raise RuntimeError(
        "`add_param_group` must not be called during a fit, because each rank's optimizer holds the parameters of its "
        "own blocks, and checkpoints know the groups that there were. Make all groups in `configure_optimizers`; "
        "one that is to wait begins with `lr=0.0`."
    )


def hand_over(transport: Transport, tensors_and_owners: Iterable[tuple[Sequence[Tensor], int]]) -> None:
    """**Collective** over all ranks: overwrite every rank's tensors with their owner's.

    Args:
        transport: Reaches the other ranks.
        tensors_and_owners: Groups of tensors and the rank whose values count, the same on all ranks.
    """
    if transport.num_ranks == 1:
        return
    with torch.no_grad():
        for tensors, owner in tensors_and_owners:
            for same_type in _by_dtype(tensors):
                if transport.rank == owner:
                    flat = torch.cat([tensor.detach().reshape(-1).cpu() for tensor in same_type])
                else:
                    # What is overwritten need not leave its device first.
                    num_elements = sum(tensor.numel() for tensor in same_type)
                    flat = torch.empty(num_elements, dtype=same_type[0].dtype, device="cpu")
                transport.broadcast(flat, owner)
                if transport.rank != owner:
                    parts = torch.split(flat, [tensor.numel() for tensor in same_type])
                    for tensor, part in zip(same_type, parts, strict=True):
                        tensor.copy_(part.view_as(tensor))


def share_from_zero(transport: Transport, tree: Any) -> Any:
    """**Collective** over all ranks: give every rank what rank 0 has, a tree of tensors that may be large."""
    if transport.rank:
        return transport.recv(0, Lane.STATE).tree
    for peer in range(1, transport.num_ranks):
        transport.send(Message((0, 0, 0, 0), tree), peer, Lane.STATE).wait()
    return tree


def synchronise_models(transport: Transport, module: DistillationModule) -> None:
    """**Collective** over all ranks: give every rank rank 0's models and seed; warns if teachers differed."""
    module.random_seed = transport.all_gather_object(module.random_seed)[0]
    teacher = [(f"teacher.{name}", value) for name, value in module.teacher.state_dict(keep_vars=True).items()]
    own = list(module.state_dict(keep_vars=True).items())
    tensors = [(name, value) for name, value in [*teacher, *own] if isinstance(value, Tensor)]
    different = synchronise(transport, tensors)
    # A momentum teacher begins as a copy of the student, and differs wherever that does.
    is_frozen = "teacher" not in dict(module.named_children())
    if is_frozen and any(name.startswith("teacher.") for name in different):
        warnings.warn(
            "The ranks had built different teachers; all took rank 0's. Load its weights from a file, or call "
            "`seed_everything` first.",
            stacklevel=2,
        )


def synchronise(transport: Transport, tensors: Sequence[tuple[str, Tensor]]) -> list[str]:
    """**Collective** over all ranks: where tensors differ between ranks, take rank 0's.

    Processes that were not seeded alike build other weights. Fingerprints are compared first, so that a large teacher
    that every rank read from one file is not sent.

    Args:
        transport: Reaches the other ranks.
        tensors: Names and tensors, in the same order on all ranks.

    Returns:
        Names of the tensors that differed.

    Raises:
        RuntimeError: The ranks' tensors have other names, shapes or types.
    """
    mine = [(name, tuple(tensor.shape), str(tensor.dtype), fingerprint(tensor)) for name, tensor in tensors]
    everyone = transport.all_gather_object(mine)
    for rank, theirs in enumerate(everyone):
        if [entry[:3] for entry in theirs] != [entry[:3] for entry in everyone[0]]:
            odd = sorted({entry[:3] for entry in theirs} ^ {entry[:3] for entry in everyone[0]})[:3]
            msg = f"every rank must build the same models, but rank {rank} differs from rank 0 in {odd}"
            raise RuntimeError(msg)
    different = [
        index for index in range(len(tensors)) if any(theirs[index] != everyone[0][index] for theirs in everyone)
    ]
    hand_over(transport, [([tensors[index][1] for index in different], 0)] if different else [])
    return [tensors[index][0] for index in different]


def fingerprint(tensor: Tensor) -> bytes:
    """Give a digest of a tensor's bytes; nothing of one without values."""
    if tensor.is_meta:
        return b""
    # Of the bytes: as fast as summing the elements, and no two elements can change places unseen.
    flat = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).digest()


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
