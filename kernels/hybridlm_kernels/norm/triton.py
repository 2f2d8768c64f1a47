"""RMS norm as Triton kernels. M rows of D, a whole row in one program's registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Specimen


@triton.jit
def _rms_forward(x_ptr, w_ptr, y_ptr, r_ptr, M, eps, shift, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < M) & (columns[None, :] < D)
    at = rows[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + shift
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(y_ptr + at, (x * r[:, None] * w[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(r_ptr + rows, r, mask=rows < M)


def rms_norm_forward(x_MD: Tensor, w_D: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    M, D = x_MD.shape
    y_MD, r_M = torch.empty_like(x_MD), torch.empty(M, dtype=torch.float32, device=x_MD.device)
    _rms_forward[(triton.cdiv(M, 4),)](x_MD, w_D, y_MD, r_M, M, eps, shift, D, triton.next_power_of_2(D), 4)
    return y_MD, r_M


SPECIMENS = [Specimen(f"rms forward D={D}", _rms_forward,
                      {"x_ptr": "*bf16", "w_ptr": "*fp32", "y_ptr": "*bf16", "r_ptr": "*fp32", "M": "i32",
                       "eps": "fp32", "shift": "fp32"}, {"D": D, "BLOCK_D": D, "ROWS": 4}) for D in (128, 2048)]
