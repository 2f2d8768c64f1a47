"""Log-linear attention token by token: the definition that other backends are compared with.

o_t = scale * sum_{s<=t} lambda_t^{level(t,s)} W_ts^T q_t,   W_ss = b_s k_s v_s^T,   W_ts = A_t W_{t-1,s}
A_t = Diag(e^{g_t}) without beta, b = 1;  A_t = (I - beta_t k_t k_t^T) Diag(e^{g_t}) with it, b = beta.
(Guo et al. 2025, Log-Linear Attention, sections 3.1 and 3.3.) The write of every token is kept apart.

Legend: B rows, T tokens, H key heads, HV value heads, K/V key/value head dim, L levels, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document, math_dtype


def level_of(t: int, s: int, levels: int) -> int:
    """The level at which token t reads token s <= t: 0 is itself, the last one has all that is older.

    >>> [level_of(7, s, levels=4) for s in range(8)], [level_of(6, s, levels=3) for s in range(7)]
    ([3, 3, 3, 3, 2, 2, 1, 0], [2, 2, 2, 2, 2, 2, 0])
    """
    return min((t ^ s).bit_length(), levels - 1)


def log_linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, lambda_BTHvL: Tensor, g: Tensor | None,
                         beta_BTHv: Tensor | None, scale: float, state_NXHvKV: Tensor | None,
                         borders: CuSeqlens | None, tokens_seen: int, final_state: bool) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked."""
    L, dtype = lambda_BTHvL.shape[-1], math_dtype(v_BTHvV)

    def steps(q: Tensor, k: Tensor, v: Tensor, scales: Tensor, g: Tensor | None, beta: Tensor | None,
              state: Tensor | None) -> tuple[Tensor, Tensor]:
        (B, T, H, K), (HV, V) = k.shape, v.shape[2:]
        q, k = (x.repeat_interleave(HV // H, dim=2)[..., None] for x in (q * scale, k))  # B T HV K 1
        writes, first = q.new_zeros(0, B, HV, K, V), []  # what each token or block wrote, and the place of its start
        if state is not None:
            for level in range(1, L):
                complete = tokens_seen >> (level - 1)  # blocks of this level
                if complete % 2 or (level == L - 1 and complete):
                    writes = torch.cat([writes, state[None, :, level - 1]])
                    first.append((complete - 1) << (level - 1) if level < L - 1 else 0)
        o = []
        for t in range(T):
            if g is not None:
                writes = g[:, t].reshape(B, HV, -1, 1).exp() * writes
            if beta is not None:
                writes = writes - beta[:, t, :, None, None] * k[:, t] @ (k[:, t].mT @ writes)
            strength = 1.0 if beta is None else beta[:, t, :, None, None]
            writes = torch.cat([writes, (strength * k[:, t] @ v[:, t, :, None, :])[None]])
            first.append(tokens_seen + t)
            scales_SBHv = scales[:, t, :, [level_of(tokens_seen + t, s, L) for s in first]].movedim(-1, 0)
            o.append((scales_SBHv[..., None] * (q[:, t].mT @ writes).squeeze(-2)).sum(0))
        levels = torch.tensor([level_of(tokens_seen + T, s, L) for s in first])
        final = [writes[levels == level].sum(0) for level in range(1, L) if final_state]
        return torch.stack(o, 1), torch.stack(final, 1) if final else q.new_zeros(B, 0, HV, K, V)

    tokens = [None if x is None else x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHvV, lambda_BTHvL, g, beta_BTHv)]
    o, state = each_document(steps, borders, tokens, state_NXHvKV)
    return o.to(v_BTHvV.dtype), state
