"""Branches of attention joined by gates: o = sum_c g_c o_c, a gate per token, head and branch.

B rows, T tokens, H heads, K head dim, C branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward

CPU_PIECE_ELEMENTS = 2**17  # of one product: it stays in the cache


def gated_sum(gates_BTHC: Tensor, branches: Sequence[Tensor]) -> Tensor:
    """Sum the branches, each times its gate.

    Args:
        gates_BTHC: gates, activated.
        branches: C outputs [B, T, H, K] of one dtype.

    Returns:
        The sum [B, T, H, K].

    >>> gates = torch.tensor([0.25, 1.0]).view(1, 1, 1, 2)
    >>> gated_sum(gates, [torch.full((1, 1, 1, 2), 4.0), torch.ones(1, 1, 1, 2)]).flatten()
    tensor([2., 2.])
    """
    same_dtype = {gates_BTHC.dtype, *(x.dtype for x in branches)} == {gates_BTHC.dtype}
    if gates_BTHC.device.type == "cpu" and same_dtype and not torch.compiler.is_compiling():
        return _GatedSum.apply(gates_BTHC, *branches)
    products = [gate[..., None] * branch for gate, branch in zip(gates_BTHC.unbind(-1), branches, strict=True)]
    return sum(products[1:], products[0])


class _GatedSum(torch.autograd.Function):
    """Products are made for a piece of the tokens at a time: new memory for each costs more than they do."""

    @staticmethod
    def forward(ctx: Any, gates_BTHC: Tensor, *branches: Tensor) -> Tensor:
        ctx.save_for_backward(gates_BTHC, *branches)
        o_BTHK = torch.empty(branches[0].shape, dtype=branches[0].dtype)
        for tokens in _pieces(o_BTHK):
            gates, o = gates_BTHC[:, tokens, :, :, None], o_BTHK[:, tokens]
            torch.mul(gates[..., 0, :], branches[0][:, tokens], out=o)
            for branch, x in enumerate(branches[1:], 1):
                o += gates[..., branch, :] * x[:, tokens]
        return o_BTHK

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do_BTHK: Tensor) -> tuple[Tensor, ...]:
        gates_BTHC, *branches = ctx.saved_tensors
        d_gates, found = torch.empty_like(gates_BTHC), [torch.empty(x.shape, dtype=x.dtype) for x in branches]
        for tokens in _pieces(do_BTHK):
            gates, do = gates_BTHC[:, tokens, :, :, None], do_BTHK[:, tokens]
            for branch, x in enumerate(branches):
                d_gates[:, tokens, :, branch] = (do * x[:, tokens]).sum(-1)
                torch.mul(do, gates[..., branch, :], out=found[branch][:, tokens])
        return d_gates, *found


def _pieces(x_BTHK: Tensor) -> list[slice]:
    """Pieces of consecutive tokens."""
    step = max(1, CPU_PIECE_ELEMENTS // (x_BTHK.shape[0] * x_BTHK.shape[2] * x_BTHK.shape[3]))
    return [slice(start, start + step) for start in range(0, x_BTHK.shape[1], step)]
