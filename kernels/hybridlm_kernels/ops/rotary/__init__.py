"""Rotary position embedding. Equation and costs: README.md."""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.ops.rotary import reference
from hybridlm_kernels.ops.rotary import torch_backend as eager
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

ROTARY = register(Operation("rotary", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.rotary.triton_backend", "rotary"),
    Backend("torch", eager.rotary),
    Backend("reference", reference.rotary))))


def rotary(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False,
           backend: str | None = None) -> Tensor:
    """Rotate the first 2R of D dims, pair by pair; the others pass unchanged. In fp32 inside, out in x.dtype.

    Args:
        x_BTHD: [B, T, H, D].
        cos_BTR, sin_BTR: [T, R] or [B, T, R], the same for all heads.
        interleaved: pairs are (2i, 2i+1), left interleaved; otherwise (i, i+R).

    Raises:
        ValueError: cos and sin that differ or do not fit x.
    """
    batch, length, _, dim = x_BTHD.shape
    pairs = cos_BTR.shape[-1]
    if cos_BTR.shape != sin_BTR.shape or cos_BTR.dim() not in (2, 3) or cos_BTR.shape[-2] != length:
        raise ValueError(f"rotary: cos {list(cos_BTR.shape)} and sin {list(sin_BTR.shape)} must both be "
                         f"[{length}, R] or [{batch}, {length}, R]")
    if cos_BTR.dim() == 3 and cos_BTR.shape[0] not in (1, batch):
        raise ValueError(f"rotary: cos has {cos_BTR.shape[0]} rows, x has {batch}")
    if 2 * pairs > dim:
        raise ValueError(f"rotary: {pairs} pairs need {2 * pairs} dims; x has {dim}")
    return choose(ROTARY, Call.of(x_BTHD), backend).run(x_BTHD, cos_BTR, sin_BTR, interleaved)
