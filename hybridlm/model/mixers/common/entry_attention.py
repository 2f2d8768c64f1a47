"""Softmax attention to all entries that a query sees, piece by piece of queries, and to a window of tokens beside them.

B rows, T queries, Q queries of a piece, H query heads, G key/value heads, R = H/G, E entries, K/V key/value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.overlap import visible_scores
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import selected_attention
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

PIECE_ELEMENTS = 2**20  # scores of a piece


def entry_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, windows: EntryWindows,
                    scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the entries of the complete windows of each query's document; zeros where there are none.

    A piece keeps its inputs alone, and is computed again in the backward: nothing of size T * E is kept.

    Args:
        q_BTHK: queries.
        k_BEGK: keys of the entries.
        v_BEGV: values of the entries.
        windows: the windows that entries stand for.
        scale: factor of the scores.

    Returns:
        Outputs [B, T, H, V] in the dtype of the values, and the logarithm of the sum of exponentials [B, T, H] in fp32
        at least, -inf where there is no entry.
    """
    batch, queries, heads = q_BTHK.shape[:3]
    groups, dim = k_BEGK.shape[2], v_BEGV.shape[3]
    size = max(8, PIECE_ELEMENTS // max(1, batch * heads * k_BEGK.shape[1]))
    found = []
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))

        def attend(q_BQHK: Tensor, k: Tensor, v: Tensor, rows: slice = rows) -> Tensor:
            with torch.autocast(q_BQHK.device.type, enabled=False):
                q_BQGRK = wide(q_BQHK).unflatten(2, (groups, -1)) * scale
                dots = torch.einsum("bqgrk,begk->bqgre", q_BQGRK, wide(k))
                score, unread, none = visible_scores(dots, windows, rows)
                p_BQGRE = torch.softmax(score, -1).masked_fill(unread, 0.0)
                o_BQGRV = torch.einsum("bqgre,begv->bqgrv", p_BQGRE, wide(v))
                lse_BQGR = score.logsumexp(-1).masked_fill(none, -torch.inf)
                return torch.cat([o_BQGRV, lse_BQGR[..., None]], -1).flatten(2, 3)

        inputs = q_BTHK[:, rows], k_BEGK, v_BEGV
        found.append(attend(*inputs) if torch.compiler.is_dynamo_compiling() else recomputed(attend, *inputs))
    o_BTHV, lse_BTH1 = torch.cat(found, 1).split([dim, 1], -1)
    return o_BTHV.to(v_BEGV.dtype), lse_BTH1[..., 0]


def window_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int, seq: SequenceInfo,
                     sinks_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attend to the last `window` tokens of each query's document, its own included.

    Args:
        q_BTHK: queries, the last T of the S tokens.
        k_BSGK: keys of the window and of any tokens before it, those of `seq.history` where rows are divided.
        v_BSGV: their values.
        window: tokens of the window.
        seq: borders of the documents.
        sinks_H: logits that take part in the softmax and carry no value.

    Returns:
        Outputs [B, T, H, V], and the logarithm of the sum of exponentials, sinks included, [B, T, H].
    """
    nothing = torch.full((*q_BTHK.shape[:2], 1, 0), -1, device=q_BTHK.device)
    return selected_attention(q_BTHK, k_BSGK, v_BSGV, nothing, window=window, sinks_H=sinks_H,
                              cu_seqlens=seq.history_borders)


def join_attention(o_BTHV: Tensor, lse_BTH: Tensor, other_BTHV: Tensor, other_lse_BTH: Tensor) -> Tensor:
    """Join attention to two sets of keys into that of one softmax over both.

    Args:
        o_BTHV: outputs over the first set, which must not be empty.
        lse_BTH: logarithm of the sum of its exponentials, sinks included.
        other_BTHV: outputs over the second set.
        other_lse_BTH: likewise; -inf where the set is empty.

    Returns:
        Outputs [B, T, H, V] in the dtype of the first ones.

    >>> one, two = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    >>> equal = torch.zeros(1, 1, 1)
    >>> join_attention(one, equal, two, equal).item()
    0.5
    """
    difference_BTH1 = (lse_BTH - other_lse_BTH)[..., None]
    joined = difference_BTH1.sigmoid() * o_BTHV + (-difference_BTH1).sigmoid() * other_BTHV
    return joined.to(o_BTHV.dtype)
