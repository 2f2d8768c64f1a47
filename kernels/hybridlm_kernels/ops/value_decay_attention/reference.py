"""Linear attention with a decay per value channel, token by token: the definition of the operation.

S_t = S_{t-1} Diag(exp(g_t)) + k_t v_t^T;  o_t = scale * S_t^T q_t
(Zhang et al. 2024, Gated Slot Attention, section 3.2, the keys of the slots.)

Legend: B rows, T tokens, H heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document, math_dtype


def value_decay_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHV: Tensor, scale: float,
                          state_NHKV: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked."""

    def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = math_dtype(v)
        (B, T, H, K), V = k.shape, v.shape[3]
        q, k, v, decay = q.to(dtype) * scale, k.to(dtype), v.to(dtype), g.to(dtype).exp()
        S = v.new_zeros(B, H, K, V) if S is None else S.to(dtype)
        o = []
        for t in range(T):
            S = S * decay[:, t, :, None] + k[:, t, :, :, None] * v[:, t, :, None]
            o.append((q[:, t, :, None] @ S)[:, :, 0])
        return torch.stack(o, dim=1), S

    o, state = each_document(steps, borders, (q_BTHK, k_BTHK, v_BTHV, g_BTHV), state_NHKV)
    return o.to(v_BTHV.dtype), state
