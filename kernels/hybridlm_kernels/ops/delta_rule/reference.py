"""The delta rule token by token: the definition that every other backend is compared with.

S_t = Diag(exp(g_t)) S_{t-1};  S_t += beta_t k_t (v_t - S_t^T k_t)^T;  o_t = scale * S_t^T q_t
(Gated DeltaNet: Yang et al. 2024, eq. 10; per-channel decay: Kimi Linear, 2025, eq. 1.)

With an erase key p and an erase vector b, and R the state before or after its decay:
S_t = Diag(exp(g_t)) S_{t-1} + b_t (p_t^T R) + k_t v_t^T;  b = -beta k with k := beta k where only p is given
(RWKV-7: Peng et al. 2025, eq. 17; Comba: Hu et al. 2025, eq. 7.)

Legend: B rows, T tokens, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document, math_dtype
from hybridlm_kernels.recurrence.erase import Erase, tensors_of
from hybridlm_kernels.recurrence.gates import Gate, log_decay, write_strength


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, beta_BTHv: Tensor | None,
               scale: float, state_NHvKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
               gate: Gate | None = None, beta_sigmoid: float | None = None, final_state: bool = True,
               erase: Erase | None = None) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked."""
    g, beta_BTHv = log_decay(g, gate), write_strength(beta_BTHv, beta_sigmoid)

    before_decay = erase is not None and erase.before_decay

    def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, p: Tensor | None,
              b: Tensor | None, S: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = math_dtype(v)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if qk_l2norm:
            q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6)
            k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
        (B, T, H, K), (HV, V) = k.shape, v.shape[2:]
        q, k = (x.repeat_interleave(HV // H, dim=2)[..., None, :] for x in (q * scale, k))  # B T HV 1 K
        p = k if p is None else p.to(dtype).repeat_interleave(HV // p.shape[2], dim=2)[..., None, :]  # B T HV 1 K
        b = None if b is None else b.to(dtype).repeat_interleave(HV // b.shape[2], dim=2)[..., None, :]
        v = v[..., None, :]  # B T HV 1 V
        decay = None if g is None else g.to(dtype).reshape(B, T, HV, -1, 1).exp()  # B T HV 1|K 1
        beta = None if beta is None else beta.to(dtype)[..., None, None]  # B T HV 1 1
        S = v.new_zeros(B, HV, K, V) if S is None else S.to(dtype)
        o = []
        for t in range(T):
            before, S = S, S if decay is None else decay[:, t] * S
            recalled = p[:, t] @ (before if before_decay else S)
            if b is None:
                correction = v[:, t] - recalled
                S = S + k[:, t].mT @ (correction if beta is None else beta[:, t] * correction)
            else:
                S = S + b[:, t].mT @ recalled + k[:, t].mT @ v[:, t]
            o.append(q[:, t] @ S)
        return torch.stack(o, dim=1)[..., 0, :], S

    o, state = each_document(steps, borders, (q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, *tensors_of(erase)), state_NHvKV)
    return o.to(v_BTHvV.dtype), state
