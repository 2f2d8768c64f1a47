"""Values of DeltaFormer, token by token: the definition that the other backend is compared with.

B rows, T tokens, P earlier tokens, S = P + T, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recurrence.arguments import each_document


def deltaformer_values(q_BTHK: Tensor, k_BSGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, past_BPHV: Tensor | None,
                       scale: float, cu_seqlens: CuSeqlens | None) -> Tensor:
    """u_t = v_t - beta_t sum_{s < t} p_ts u_s, p_t = softmax over s < t of scale q_t . k_s; u = v on a first token.

    Zhong et al. 2025, Understanding Transformer from the Perspective of Associative Memory, section 3.
    """

    def steps(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        copies = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
        u = list(() if past is None else wide(past).unbind(1))
        first = len(u)
        for t in range(q.shape[1]):
            u_t = v[:, t]
            if u:
                p_BSH = (torch.einsum("bhk,bshk->bsh", q[:, t], k[:, : len(u)]) * scale).softmax(1)
                u_t = u_t - beta[:, t, :, None] * torch.einsum("bsh,bshv->bhv", p_BSH, torch.stack(u, 1))
            u.append(u_t)
        return torch.stack(u[first:], 1), u[-1]

    tokens = tuple(wide(x) for x in (q_BTHK, k_BSGK, v_BTGV, beta_BTH))
    return each_document(steps, cu_seqlens, tokens, past_BPHV)[0].to(v_BTGV.dtype)
