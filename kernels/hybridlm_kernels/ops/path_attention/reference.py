"""PaTH attention token by token: every key passes through the reflections of all tokens after it.

B rows, T tokens, P earlier keys, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recurrence.arguments import each_document


def path_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BSGV: Tensor, w_BTGK: Tensor, beta_BTG: Tensor,
                   g_BSH: Tensor | None, past_BPGK: Tensor | None, scale: float,
                   cu_seqlens: CuSeqlens | None) -> Tensor:
    """o_t = sum_s softmax_s(scale q_t^T H_t ... H_{s+1} k_s + F_t - F_s) v_s, H_i = I - beta_i w_i w_i^T.

    Yang et al. 2025 (PaTH attention), eq. 2 and 3.
    """

    def steps(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None,
              _: Tensor | None) -> tuple[Tensor, Tensor]:
        copies = q.shape[2] // k.shape[2]
        keys = k[:, :0] if past_BPGK is None else wide(past_BPGK)
        past = keys.shape[1]
        outputs = []
        for t in range(q.shape[1]):
            w_t, beta_t = w[:, t, None], beta[:, t, None, :, None]
            keys = torch.cat([keys - beta_t * (keys * w_t).sum(-1, keepdim=True) * w_t, k[:, t, None]], 1)
            score_BSH = torch.einsum("bhk,bshk->bsh", q[:, t], keys.repeat_interleave(copies, 2)) * scale
            if g is not None:  # minus the sum of all gates behind each key
                inside = g[:, : past + t + 1]
                score_BSH = score_BSH + inside.flip(1).cumsum(1).flip(1) - inside
            values = v[:, : past + t + 1].repeat_interleave(copies, 2)
            outputs.append(torch.einsum("bsh,bshv->bhv", score_BSH.softmax(1), values))
        return torch.stack(outputs, 1), keys

    tokens = tuple(None if x is None else wide(x) for x in (q_BTHK, k_BTGK, v_BSGV, w_BTGK, beta_BTG, g_BSH))
    if cu_seqlens is None:
        return steps(*tokens, None)[0].to(v_BSGV.dtype)  # type: ignore

    def output_only(*document: Tensor | None) -> tuple[Tensor, Tensor]:
        o = steps(*document)[0]  # type: ignore[arg-type]
        return o, o[:, 0]

    return each_document(output_only, cu_seqlens, tokens, None)[0].to(v_BSGV.dtype)
