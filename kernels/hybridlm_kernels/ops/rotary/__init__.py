"""Rotary position embedding. Equation and costs: README.md."""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.rotary import reference, torch_backend
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

ROTARY = register(Operation("rotary", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.rotary.triton_backend", "rotary"),
    Backend("torch", torch_backend.rotary),
    Backend("reference", reference.rotary))))


@compilable(lambda x_BTHD, *_, **__: x_BTHD.new_empty(x_BTHD.shape), formula=reference.rotary)
def rotary(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False,
           backend: str | None = None) -> Tensor:
    """Rotary position embedding: rotates the first 2R of D dims pair by pair, in fp32; the others pass unchanged.

        (a, b) -> (a cos - b sin, b cos + a sin)

    Args:
        x_BTHD: raw queries or keys [B, T, H, D].
        cos_BTR: cosines of the angles [T, R] or [B, T, R], the same for all heads.
        sin_BTR: sines of the angles, of the same shape.
        interleaved: pairs are (2i, 2i+1), left interleaved; otherwise (i, i+R).
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [B, T, H, D] in x's dtype. Differentiable in x.

    Raises:
        ValueError: cos and sin differ in shape or do not fit x.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Su et al. 2021, RoFormer, eq. 34.

    >>> import torch
    >>> x = torch.tensor([1.0, 0.0, 5.0]).view(1, 1, 1, 3)  # a quarter turn of the first pair
    >>> rotary(x, torch.tensor([[0.0]]), torch.tensor([[1.0]])).flatten()
    tensor([0., 1., 5.])
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
