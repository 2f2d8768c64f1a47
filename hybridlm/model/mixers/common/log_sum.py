"""Means of past values, weighted by exponentials of keys that decay: the recurrence of RWKV-4 and AFT-simple.

    y_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same with v = 1),   w <= 0, channel by channel

Numerator and denominator are divided by e^{m_t}, m_t = max(w + m_{t-1}, k_t), on which y does not depend.
Sources: Peng et al. 2023, RWKV, eq. 16 and appendix D; Zhai et al. 2021, AFT, eq. 5 (w = u = 0).

B rows, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.mixers.common.scan import FP32_BYTES, maxima_traffic, scan_maxima, scan_tokens, scan_traffic
from hybridlm.model.mixers.common.token_shift import previous_tokens
from hybridlm.model.sequence import SequenceInfo


def read_weighted_mean(k_BTC: Tensor, v_BTC: Tensor, w_C: Tensor, u_C: Tensor, seq: SequenceInfo,
                       state: TensorState | None = None) -> Tensor:
    """Run the recurrence over each document.

    Args:
        k_BTC: keys, the logarithms of the weights.
        v_BTC: values.
        w_C: what the logarithm of a weight changes by at every token, at most 0.
        u_C: what is added to the key of the token itself.
        seq: borders of the documents, and the shard of the rows held here.
        state: decode state, which keeps `sums` and `max`.

    Returns:
        y [B, T, C] in fp32 at least.

    >>> k, v = torch.zeros(1, 3, 1), torch.tensor([3.0, 0.0, 6.0]).view(1, 3, 1)
    >>> read_weighted_mean(k, v, torch.zeros(1), torch.zeros(1), SequenceInfo.make(1, 3, k.device)).flatten()
    tensor([3.0000, 1.5000, 3.0000])
    """
    wide = torch.promote_types(v_BTC.dtype, torch.float32)
    k_BTC, v_BTC = k_BTC.to(wide), v_BTC.to(wide)
    w_BTC = w_C.to(wide).expand_as(k_BTC)
    m_BTC, before_BTC = scan_maxima(k_BTC, w_BTC, seq, state)
    write_BTC, keep_BTC = (k_BTC - m_BTC).exp(), (w_BTC + before_BTC - m_BTC).exp()
    start = {} if state is None or "sums" not in state.tensors else {"sums": state.tensors["sums"]}
    sums_BTX = scan_tokens(torch.cat([write_BTC * v_BTC, write_BTC], -1), torch.cat([keep_BTC, keep_BTC], -1), seq,
                           state, "sums")
    # What the token reads of the past: sums before it was added. They start anew where a document does.
    above_BTC, below_BTC = previous_tokens(sums_BTX, seq, TensorState(start), "sums").chunk(2, -1)
    own_BTC = k_BTC + u_C.to(wide)
    largest_BTC = torch.maximum(before_BTC, own_BTC).detach()
    past_BTC, own_BTC = (before_BTC - largest_BTC).exp(), (own_BTC - largest_BTC).exp()
    return (past_BTC * above_BTC + own_BTC * v_BTC) / (past_BTC * below_BTC + own_BTC)


def mean_traffic(rows: int, channels: int) -> list[ShardTraffic]:
    """Bytes that the recurrence exchanges between shards of rows: the maxima, the sums, and the last sums again."""
    tail = 2 * FP32_BYTES * rows * channels
    return [maxima_traffic(rows, channels), scan_traffic(rows, 2 * channels),
            ShardTraffic("from_previous", tail, tail)]
