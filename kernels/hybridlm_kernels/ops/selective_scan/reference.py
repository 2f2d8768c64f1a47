"""Selective scan, token by token: the definition that every other backend is compared with.

h_t[d, n] = f_t[d, n] h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d];   y_t[d] = sum_n C_t[n] h_t[d, n]
f_t[d, n] = exp(dt_t[d] A[d, n]) (Gu and Dao 2023, Mamba, algorithm 2), or without A 1 - dt_t[d] B_t[n]^2 (Liu et al.
2024, Longhorn, section 3.2).

Legend: R rows, T tokens, D channels, N states per channel, M documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document, math_dtype


def selective_scan(x_RTD: Tensor, dt_RTD: Tensor, A_DN: Tensor | None, B_RTN: Tensor, C_RTN: Tensor,
                   state_MDN: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked."""

    def steps(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = math_dtype(x)
        x, dt, B, C = (t.to(dtype) for t in (x, dt, B, C))
        h = x.new_zeros(x.shape[0], x.shape[2], B.shape[2]) if h is None else h.to(dtype)
        outputs = []
        for t in range(x.shape[1]):
            dt_RD1, B_R1N = dt[:, t, :, None], B[:, t, None, :]
            factor = (dt_RD1 * A_DN.to(dtype)).exp() if A_DN is not None else 1.0 - dt_RD1 * B_R1N**2
            h = factor * h + dt_RD1 * B_R1N * x[:, t, :, None]
            outputs.append((h @ C[:, t, :, None])[..., 0])
        return (torch.stack(outputs, 1) if outputs else x), h

    y, state = each_document(steps, borders, (x_RTD, dt_RTD, B_RTN, C_RTN), state_MDN)
    return y.to(x_RTD.dtype), state
