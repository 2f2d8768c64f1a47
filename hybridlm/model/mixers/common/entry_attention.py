"""Softmax attention to all entries that a query sees, and to a window of tokens beside them.

B rows, T queries, H query heads, G key/value heads, R = H/G, E entries, K/V key/value dim; X = B * G, Q queries of a
piece, C entries that one of them sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import range_attention, selected_attention
from hybridlm_kernels.ops.range_attention.ranges import Ranges, weigh
from hybridlm_kernels.precision import wide


def entry_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, windows: EntryWindows,
                    scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the entries of the complete windows of each query's document; zeros where there are none.

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
    return range_attention(q_BTHK, k_BEGK, v_BEGV, windows.first_BT, windows.count_BT, scale=scale)


@torch.no_grad()
def entry_weights(q_BTHK: Tensor, k_BEGK: Tensor, windows: EntryWindows, rows: slice, scale: float) -> Tensor:
    """Softmax weights of all entries, summed over the query heads of each key head, without a gradient.

    Args:
        q_BTHK: queries.
        k_BEGK: keys of the entries.
        windows: the windows that entries stand for.
        rows: the queries whose weights are wanted.
        scale: factor of the scores.

    Returns:
        Weights [B, Q, G, E] in fp32 at least; zeros for entries that a query does not see.
    """
    batch, number, groups = k_BEGK.shape[:3]
    heads_first = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHK.unflatten(2, (groups, -1)), k_BEGK))
    with torch.autocast(q_BTHK.device.type, enabled=False):
        q_XTRK, k = heads_first
        k = wide(k) * scale
        weight_XQE = k.new_zeros(k.shape[0], rows.stop - rows.start, number)
        ranges = Ranges(windows.first_BT, windows.count_BT)
        for piece in ranges.pieces(k.shape[0] * q_XTRK.shape[2], number, rows):
            p_XMC, total_XM1, _ = weigh(q_XTRK, k, ranges, piece)
            p_XMC /= total_XM1.masked_fill_(total_XM1 == 0, 1.0)
            queries = slice(piece.queries.start - rows.start, piece.queries.stop - rows.start)
            weight_XQE[:, queries, piece.keys] = p_XMC.unflatten(1, (-1, q_XTRK.shape[2])).sum(2)
    return weight_XQE.unflatten(0, (batch, groups)).transpose(1, 2)


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
