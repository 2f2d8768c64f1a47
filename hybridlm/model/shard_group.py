"""A shard group with differentiable exchanges, built on four collectives without gradients.

x: any shape; P shards of the same rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class AdjointShardGroup(ABC):
    """A `ShardGroup` built on collectives, whose adjoints are the backward passes of its exchanges.

    `reduce_scatter` is the adjoint of `all_gather`, `all_to_all` its own, and a shift by -1 that of a shift by 1.
    """

    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """Gather the x of all shards, [P, ...], in order; differentiable."""
        return _DifferentiableGather.apply(x, self)

    def exchange(self, x_P: Tensor) -> Tensor:
        """Send entry j to shard j; entry i of the result [P, ...] comes from shard i; differentiable."""
        return _DifferentiableExchange.apply(x_P, self)

    def from_previous(self, x: Tensor) -> Tensor:
        """Receive the x of the shard before this one, zeros in the first; differentiable."""
        return _DifferentiableShift.apply(x, self)

    @abstractmethod
    def all_sum(self, x: Tensor) -> Tensor:
        """Sum x over all shards, without gradient."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """Gather x [...] of all shards: [P, ...], in order."""

    @abstractmethod
    def reduce_scatter(self, x_P: Tensor) -> Tensor:
        """Sum the entries for this shard over all shards: x [P, ...] -> [...]."""

    @abstractmethod
    def all_to_all(self, x_P: Tensor) -> Tensor:
        """Send entry j of x [P, ...] to shard j; entry i of the result comes from shard i."""

    @abstractmethod
    def shift(self, x: Tensor, step: int) -> Tensor:
        """Receive the x of the shard with index `rank - step`; zeros where there is none."""


class _DifferentiableGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AdjointShardGroup) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, d_P: Tensor) -> Any:
        return ctx.group.reduce_scatter(d_P), None


class _DifferentiableExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_P: Tensor, group: AdjointShardGroup) -> Tensor:
        ctx.group = group
        return group.all_to_all(x_P)

    @staticmethod
    def backward(ctx: Any, d_P: Tensor) -> Any:
        return ctx.group.all_to_all(d_P), None


class _DifferentiableShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AdjointShardGroup) -> Tensor:
        ctx.group = group
        return group.shift(x, 1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return ctx.group.shift(d, -1), None
