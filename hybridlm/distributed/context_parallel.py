"""Context parallel: rows split over ranks, by the collective operations behind `hybridlm.model.context_parallel`.

`size` consecutive ranks form a group that holds the shards of the same rows, in order; the groups divide the batch.
Every rank's losses are sums over its own tokens, so the gradients of all ranks add up as they do without shards.
x: any shape; P ranks of a group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hybridlm.model.shard_group import AdjointShardGroup

# The second names are those before torch 2.13.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextParallelGroup(AdjointShardGroup):
    """The shard group of the ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @classmethod
    def make(cls, size: int) -> ContextParallelGroup:
        """Make groups of `size` consecutive ranks, and return this rank's. All ranks call it together; `size` divides
        their number."""
        world = dist.get_world_size()
        group, _ = dist.new_subgroups_by_enumeration([[*range(g, g + size)] for g in range(0, world, size)])
        return cls(group)

    def all_sum(self, x: Tensor) -> Tensor:
        """Return x summed over the ranks, without gradients."""
        summed = x.detach().clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of every rank, [P, ...], for x [...]."""
        gathered_P = x.new_empty(self.size, *x.shape)
        all_gather_single(gathered_P.view(-1), x.reshape(-1), group=self.group)
        return gathered_P

    def reduce_scatter(self, x_P: Tensor) -> Tensor:
        """Return the sum over ranks of their entries for this rank, [...], for x_P [P, ...]."""
        summed = x_P.new_empty(x_P.shape[1:])
        reduce_scatter_single(summed.view(-1), x_P.reshape(-1), group=self.group)
        return summed

    def all_to_all(self, x_P: Tensor) -> Tensor:
        """Send entry j of x_P [P, ...] to rank j; return the entries that came, by rank, [P, ...]."""
        received_P = x_P.new_empty(x_P.shape)
        dist.all_to_all_single(received_P.view(-1), x_P.reshape(-1), group=self.group)
        return received_P

    def shift(self, x: Tensor, step: int) -> Tensor:
        """Return the x of the rank `step` before this one, zeros where there is none."""
        sent, received = ([x.numel() if rank == other else 0 for rank in range(self.size)]
                          for other in (self.rank + step, self.rank - step))
        arrived = x.new_empty(sum(received))
        leaving = x.contiguous().view(-1) if any(sent) else x.new_empty(0)  # a view of a column stays strided else
        dist.all_to_all_single(arrived, leaving, received, sent, group=self.group)
        return arrived.view(x.shape) if any(received) else torch.zeros_like(x)
