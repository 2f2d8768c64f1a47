"""Where the elements of a parameter lie among the ranks of DeepSpeed's ZeRO optimizers, which keep them flat.

It reads private names of DeepSpeed (`_hp_mapping`, `grad_position`), which is therefore pinned: its own public ways
in and out fail under ZeRO-3 where a size does not divide by the ranks, and cannot set the count of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridlm.tensor_storage import StoredTensor


@dataclass(frozen=True)
class Fragment:
    """This rank's elements of one parameter: `numel` from `start`, found in `flat` from `offset`. None are 0 elements.

    `flat` is what the optimizer updates: a rank's fp32 partition of a group of parameters. `group` are the ranks that
    hold the parameter together.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int
    shape: torch.Size
    group: dist.ProcessGroup

    def whole(self, flat: Tensor, device: torch.device, owner: int | None = None) -> Tensor:
        """The elements of all ranks, which call it together; `flat`: the weights, or state laid out as they are.

        With an `owner`, a rank of the group, only that one has them after.
        """
        whole = torch.zeros(self.shape.numel(), dtype=torch.float32, device=device)
        whole.narrow(0, self.start, self.numel).copy_(self.elements(flat))
        if owner is None:
            dist.all_reduce(whole, group=self.group)
        else:
            dist.reduce(whole, group=self.group, group_dst=owner)
        return whole.view(self.shape)

    def elements(self, flat: Tensor) -> Tensor:
        """This rank's elements within `flat`, a view: [numel]."""
        return flat.narrow(0, self.offset, self.numel)

    def place(self, flat: Tensor, whole: Tensor) -> None:
        """Put this rank's elements of `whole` where they belong in `flat`."""
        self.elements(flat).copy_(whole.flatten().narrow(0, self.start, self.numel))


def held(weight: Any) -> Tensor:
    """What this rank holds of a weight between steps: under ZeRO-3 its piece, without the padding; else all of it."""
    if not hasattr(weight, "ds_id"):
        return weight
    return weight.ds_tensor[:max(0, min(weight.ds_tensor.numel(), weight.ds_numel - _start(weight)))]


def gathered(weight: Any) -> Tensor:
    """A copy of a weight of ZeRO-3, whole and as the optimizer left it, whatever it travels in during a step. The ranks
    that hold it call it together."""
    group, device = weight.ds_process_group, weight.device
    piece = weight.ds_tensor.to(device)
    whole = torch.empty(piece.numel() * dist.get_world_size(group), dtype=piece.dtype, device=device)
    dist.all_gather_into_tensor(whole, piece, group=group)
    return whole[:weight.ds_numel].view(weight.ds_shape)


def fill(weight: Any, stored: StoredTensor) -> None:
    """Read a weight, or this rank's piece of it."""
    if hasattr(weight, "ds_id"):
        piece = held(weight)
        piece.copy_(stored.elements(_start(weight), piece.numel()))
    else:
        weight.copy_(stored.read())


def _start(weight: Any) -> int:
    """The first element of this rank's piece: every rank has an equal one, the last ones padded."""
    return dist.get_rank(weight.ds_process_group) * weight.ds_tensor.numel()


def locate(optimizer: Any, parameter: Any, index: int) -> Fragment:
    """The fragment of a parameter in the group number `index` of a ZeRO optimizer of any stage."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        part, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
        return Fragment(optimizer.fp32_partitioned_groups_flat[part], offset, start,
                        min(size, parameter.ds_numel - start), parameter.ds_shape, parameter.ds_process_group)
    flat, mapping = optimizer.single_partition_of_fp32_groups[index], parameter._hp_mapping
    here, there = (0, 0) if mapping is None else (mapping.hp_fragment_address.start, mapping.lp_fragment_address.start)
    return Fragment(flat, here, there, 0 if mapping is None else mapping.lp_fragment_address.numel, parameter.shape,
                    parameter._dp_group)
