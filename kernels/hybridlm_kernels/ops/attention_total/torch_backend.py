"""Softmax attention and the sum of its exponentials, in blocks of queries that keep no scores for the backward.

B rows, T queries, S keys, H query heads, G key/value heads, R = H / G, K key dim, V value dim, Q queries of a block,
W keys that a block sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

BLOCK_QUERIES = 128


def attention_total(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, window: int | None,
                    cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _rows(q, k, v, scale, window)

    if cu_seqlens is not None and cu_seqlens.num_documents > q_BTHK.shape[0]:
        both = each_document_row(rows, (q_BTHK, k_BSGK, v_BSGV), cu_seqlens)
    else:
        both = rows(q_BTHK, k_BSGK, v_BSGV)
    return both[..., :-1].to(v_BSGV.dtype), both[..., -1]


def _rows(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, window: int | None) -> Tensor:
    """Outputs and totals side by side [B, T, H, V + 1] where every row is one document."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    out = []
    for start in range(0, T, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, T)
        first, last = S - T + start, S - T + stop  # positions of the queries
        oldest = 0 if window is None else max(0, first - window + 1)
        hidden_QW = hidden_keys(first, last, oldest, window, q_BTHK.device)
        out.append(recomputed(lambda q, k, v, hidden_QW=hidden_QW: _block(q, k, v, scale, hidden_QW),
                              q_BTHK[:, start:stop], k_BSGK[:, oldest:last], v_BSGV[:, oldest:last]))
    return torch.cat(out, 1) if len(out) > 1 else out[0]


def hidden_keys(first: int, last: int, oldest: int, window: int | None, device: torch.device) -> Tensor:
    """Mark the keys oldest .. last - 1 that the queries first .. last - 1 do not see: bool [Q, W].

    >>> hidden_keys(2, 4, 1, 2, torch.device("cpu")).int()
    tensor([[0, 0, 1],
            [1, 0, 0]], dtype=torch.int32)
    """
    t_Q1 = torch.arange(first, last, device=device)[:, None]
    s_W = torch.arange(oldest, last, device=device)
    hidden_QW = s_W > t_Q1
    return hidden_QW if window is None else hidden_QW | (s_W <= t_Q1 - window)


def _block(q_BQHK: Tensor, k_BWGK: Tensor, v_BWGV: Tensor, scale: float, hidden_QW: Tensor) -> Tensor:
    """Outputs and totals [B, Q, H, V + 1] of a block; the heads of a group are rows of one product."""
    B, Q, H, _ = q_BQHK.shape
    G = k_BWGK.shape[2]
    q_BGrK = wide(q_BQHK).transpose(1, 2).reshape(B, G, -1, q_BQHK.shape[-1])
    k_BGWK, v_BGWV = (wide(x).transpose(1, 2) for x in (k_BWGK, v_BWGV))
    score_BHQW = (q_BGrK * scale @ k_BGWK.mT).view(B, H, Q, -1).masked_fill(hidden_QW, -torch.inf)
    weight_BHQW = (score_BHQW - score_BHQW.amax(-1, keepdim=True)).exp()
    total_BHQ1 = weight_BHQW.sum(-1, keepdim=True)
    o_BHQV = (weight_BHQW.view(B, G, -1, weight_BHQW.shape[-1]) @ v_BGWV).view(B, H, Q, -1) / total_BHQ1
    return torch.cat([o_BHQV, total_BHQ1], -1).transpose(1, 2)
