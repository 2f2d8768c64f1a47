"""2-simplicial attention in blocks of queries, whose scores are computed again in the backward.

A query and a second key multiply to a query of ordinary attention to the first keys, so both products are matrix
products: (q_t * k'_r) . k_s, and sum_r v'_r * (sum_s p_tsr v_s).

B rows, T queries, H query heads, G key/value heads, R = H / G, K key dim, V value dim, Q queries of a block, W and U
first and second keys that a block sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

BLOCK_QUERIES = 16


def simplicial_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, k2_BRGK: Tensor, v2_BRGV: Tensor, scale: float,
                         window: int, second_window: int, cu_seqlens: CuSeqlens | None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""

    def rows(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        return _rows(q, k, v, k2, v2, scale, window, second_window)

    tokens = (q_BTHK, k_BSGK, v_BSGV, k2_BRGK, v2_BRGV)
    if cu_seqlens is not None and cu_seqlens.num_documents > q_BTHK.shape[0]:
        return each_document_row(rows, tokens, cu_seqlens)
    return rows(*tokens)


def _rows(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, scale: float, window: int,
          second_window: int) -> Tensor:
    """The outputs where every row is one document."""
    T, out = q.shape[1], []
    for start in range(0, T, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, T)
        first, near_QW = _visible_keys(k.shape[1] - T, start, stop, window, q.device)
        second, near_QU = _visible_keys(k2.shape[1] - T, start, stop, second_window, q.device)
        hidden_QUW = ~(near_QU[:, :, None] & near_QW[:, None])
        out.append(recomputed(
            lambda q, k, v, k2, v2, hidden_QUW=hidden_QUW: _block(q * scale, k, v, k2, v2, hidden_QUW),
            wide(q[:, start:stop]), k[:, first], v[:, first], k2[:, second], v2[:, second]))
    return torch.cat(out, 1).to(v.dtype)


def _visible_keys(past: int, start: int, stop: int, window: int, device: torch.device) -> tuple[slice, Tensor]:
    """The keys that one of the queries start .. stop - 1 sees, and which of them each sees: bool [Q, keys]."""
    oldest = max(0, past + start - window + 1)
    t_Q1 = torch.arange(past + start, past + stop, device=device)[:, None]
    s_W = torch.arange(oldest, past + stop, device=device)
    return slice(oldest, past + stop), (s_W <= t_Q1) & (s_W > t_Q1 - window)


def _block(q_BQHK: Tensor, k_BWGK: Tensor, v_BWGV: Tensor, k2_BUGK: Tensor, v2_BUGV: Tensor,
           hidden_QUW: Tensor) -> Tensor:
    """The outputs [B, Q, H, V] of a block of queries."""
    B, Q, H, _ = q_BQHK.shape
    W, G = k_BWGK.shape[1:3]
    U = k2_BUGK.shape[1]
    k, v, k2, v2 = (wide(x).transpose(1, 2) for x in (k_BWGK, v_BWGV, k2_BUGK, v2_BUGV))
    q_BGRQK = q_BQHK.transpose(1, 2).unflatten(1, (G, H // G))
    pair_BGxK = (q_BGRQK[..., None, :] * k2[:, :, None, None]).flatten(2, 4)
    score_BGRQUW = (pair_BGxK @ k.mT).view(B, G, H // G, Q, U, W).masked_fill(hidden_QUW, -torch.inf)
    p_BGxW = score_BGRQUW.flatten(4).softmax(-1).view(B, G, -1, W)
    read_BGRQUV = (p_BGxW @ v).view(B, G, H // G, Q, U, -1)
    return (read_BGRQUV * v2[:, :, None, None]).sum(4).flatten(1, 2).transpose(1, 2)
