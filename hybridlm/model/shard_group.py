"""A shard group whose exchanges carry gradients, made of four collectives that know nothing of gradients.

x: any shape; P shards of the same rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class AdjointShardGroup(ABC):
    """A `ShardGroup` over collectives: `all_gather` and `reduce_scatter` are each other's adjoints, so are `all_to_all`
    and itself, and a shift and the shift back."""

    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """[P, ...]: everyone's x, in order."""
        return _Gather.apply(x, self)

    def exchange(self, x_P: Tensor) -> Tensor:
        """[P, ...]: entry j goes to shard j, entry i of the result comes from shard i."""
        return _Exchange.apply(x_P, self)

    def from_previous(self, x: Tensor) -> Tensor:
        """The x of the shard before; zeros in the first."""
        return _Shift.apply(x, self)

    @abstractmethod
    def all_sum(self, x: Tensor) -> Tensor:
        """The sum of everyone's x. No gradient."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """[P, ...] of [...]: everyone's x, in order."""

    @abstractmethod
    def reduce_scatter(self, x_P: Tensor) -> Tensor:
        """[...]: the sum over shards of their entries for this one."""

    @abstractmethod
    def all_to_all(self, x_P: Tensor) -> Tensor:
        """[P, ...]: entry j goes to shard j."""

    @abstractmethod
    def shift(self, x: Tensor, step: int) -> Tensor:
        """The x of the shard `step` before this one; zeros where there is none."""


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AdjointShardGroup) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, d_P: Tensor) -> Any:
        return ctx.group.reduce_scatter(d_P), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_P: Tensor, group: AdjointShardGroup) -> Tensor:
        ctx.group = group
        return group.all_to_all(x_P)

    @staticmethod
    def backward(ctx: Any, d_P: Tensor) -> Any:
        return ctx.group.all_to_all(d_P), None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AdjointShardGroup) -> Tensor:
        ctx.group = group
        return group.shift(x, 1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return ctx.group.shift(d, -1), None
