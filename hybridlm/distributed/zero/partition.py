"""The elements of a parameter among the ranks of DeepSpeed's ZeRO optimizers, which keep them flat.

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
    """This rank's elements of one parameter: `numel` of them (perhaps 0), from element `start` of the flattened
    parameter on, which lie in `flat` from `offset` on.

    `flat` is what the optimizer updates: this rank's fp32 partition of a group of parameters. `group` are the ranks
    that hold the parameter together.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int
    shape: torch.Size
    group: dist.ProcessGroup

    def gather(self, flat: Tensor, device: torch.device, owner: int | None = None) -> Tensor:
        """Put the elements of all ranks together; the ranks of `group` call it together.

        Args:
            flat: the partition of the weights, or optimizer state laid out as they are.
            device: where the result is.
            owner: rank of the group that alone gets the result; None: all do.

        Returns:
            A tensor of the parameter's shape; on other ranks than `owner` its values mean nothing.
        """
        complete = torch.zeros(self.shape.numel(), dtype=torch.float32, device=device)
        complete.narrow(0, self.start, self.numel).copy_(self.local_elements(flat))
        if owner is None:
            dist.all_reduce(complete, group=self.group)
        else:
            dist.reduce(complete, group=self.group, group_dst=owner)
        return complete.view(self.shape)

    def local_elements(self, flat: Tensor) -> Tensor:
        """Return this rank's elements within `flat`, a view: [numel]."""
        return flat.narrow(0, self.offset, self.numel)

    def write_back(self, flat: Tensor, complete: Tensor) -> None:
        """Copy this rank's elements of the `complete` tensor to where they belong in `flat`."""
        self.local_elements(flat).copy_(complete.flatten().narrow(0, self.start, self.numel))


def local_elements(weight: Any) -> Tensor:
    """Return the elements of a weight that this rank keeps between steps: under ZeRO-3 its shard without the padding,
    [elements]; else the weight itself."""
    if not hasattr(weight, "ds_id"):
        return weight
    shard = weight.ds_tensor
    return shard[:max(0, min(shard.numel(), weight.ds_numel - _first_element(weight)))]


def gather_weight(weight: Any) -> Tensor:
    """Return a complete copy of a ZeRO-3 weight as the optimizer left it, whatever dtype it travels in during a step.

    The ranks that hold its shards call it together.
    """
    group, device = weight.ds_process_group, weight.device
    shard = weight.ds_tensor.to(device)
    complete = torch.empty(shard.numel() * dist.get_world_size(group), dtype=shard.dtype, device=device)
    dist.all_gather_into_tensor(complete, shard, group=group)
    return complete[:weight.ds_numel].view(weight.ds_shape)


def read_weight(weight: Any, stored: StoredTensor) -> None:
    """Fill a weight, or this rank's shard of it, from a file."""
    if hasattr(weight, "ds_id"):
        shard = local_elements(weight)
        shard.copy_(stored.elements(_first_element(weight), shard.numel()))
    else:
        weight.copy_(stored.read())


def _first_element(weight: Any) -> int:
    """Index of this rank's first element: every rank has a shard of one size, the last ones padded."""
    return dist.get_rank(weight.ds_process_group) * weight.ds_tensor.numel()


def locate_fragment(optimizer: Any, parameter: Any, group_index: int) -> Fragment:
    """Find this rank's elements of a parameter, which is in group number `group_index` of a ZeRO optimizer."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        partition, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
        return Fragment(optimizer.fp32_partitioned_groups_flat[partition], offset, start,
                        min(size, parameter.ds_numel - start), parameter.ds_shape, parameter.ds_process_group)
    flat, mapping = optimizer.single_partition_of_fp32_groups[group_index], parameter._hp_mapping
    if mapping is None:  # all elements lie on other ranks
        return Fragment(flat, 0, 0, 0, parameter.shape, parameter._dp_group)
    address = mapping.lp_fragment_address
    return Fragment(flat, mapping.hp_fragment_address.start, address.start, address.numel, parameter.shape,
                    parameter._dp_group)
