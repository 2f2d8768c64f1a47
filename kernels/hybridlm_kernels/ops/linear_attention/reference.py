"""Linear attention with decay, token by token: the definition that every other backend is compared with.

S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t
(RetNet: Sun et al. 2023, eq. 6; Lightning attention: MiniMax-01, 2025; GLA: Yang et al. 2023, eq. 3.)

Legend: B rows, T tokens, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document, math_dtype
from hybridlm_kernels.recurrence.gates import Gate, log_decay


def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, scale: float,
                    state_NHvKV: Tensor | None, borders: CuSeqlens | None,
                    gate: Gate | None = None, final_state: bool = True) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked."""
    g = log_decay(g, gate)

    def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = math_dtype(v)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        (B, T, H, K), (HV, V) = k.shape, v.shape[2:]
        q, k = (x.repeat_interleave(HV // H, dim=2)[..., None, :] for x in (q * scale, k))  # B T HV 1 K
        v = v[..., None, :]  # B T HV 1 V
        decay = None if g is None else g.to(dtype).reshape(B, T, HV, -1, 1).exp()  # B T HV 1|K 1
        S = v.new_zeros(B, HV, K, V) if S is None else S.to(dtype)
        o = []
        for t in range(T):
            S = S if decay is None else decay[:, t] * S
            S = S + k[:, t].mT @ v[:, t]
            o.append(q[:, t] @ S)
        return torch.stack(o, dim=1)[..., 0, :], S

    if g is not None and g.dim() == 1:  # constant: one number per head
        g = g.expand(*v_BTHvV.shape[:3])
    o, state = each_document(steps, borders, (q_BTHK, k_BTHK, v_BTHvV, g), state_NHvKV)
    return o.to(v_BTHvV.dtype), state
