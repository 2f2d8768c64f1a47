"""Reads and writes of residual streams as their equations say, in fp32 or better.

M streams, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.precision import wide


def read_streams(streams: Tensor, read: Tensor) -> Tensor:
    """x = sum_i read_i X_i."""
    return (read[..., None] * wide(streams)).sum(-2).to(streams.dtype)


def write_streams(streams: Tensor, carry: Tensor | None, write: Tensor, output: Tensor) -> Tensor:
    """X'_j = sum_i carry_ij X_i + write_j y; without carry weights X'_j = X_j + write_j y."""
    x = wide(streams)
    carried = x
    if carry is not None:
        carried = torch.zeros_like(x)
        for i in range(x.shape[-2]):
            carried = carried + carry[..., i, :, None] * x[..., i, None, :]
    return (carried + write[..., None] * wide(output)[..., None, :]).to(streams.dtype)
