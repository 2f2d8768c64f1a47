"""Softmax over the tokens so far, per channel, as write weights and decays of a recurrence (ABC, LightNet).

B rows, T tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.mixers.common.scan import FP32_BYTES, maxima_traffic, scan_maxima, scan_tokens, scan_traffic
from hybridlm.model.mixers.common.token_shift import previous_tokens
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


def cumulative_softmax(logits_BTC: Tensor, seq: SequenceInfo,
                       state: TensorState | None = None) -> tuple[Tensor, Tensor]:
    """Write weights and decays by which a state holds the average of its writes, weighted by the softmax of all logits.

        z_t = log(e^{s_1} + ... + e^{s_t});   w_t = e^{s_t - z_t};   g_t = z_{t-1} - z_t
        S_t = e^{g_t} S_{t-1} + w_t v_t   is then   sum_{j<=t} e^{s_j - z_t} v_j

    Sums of exponentials are divided by that of the largest logit so far, on which w and g do not depend: logits of any
    size are allowed, and a token sees no later one.

    Args:
        logits_BTC: logits s.
        seq: borders of the documents, at each of which the softmax starts anew, and the shard of the rows held here.
        state: decode state, which keeps `sums` and `max` of the earlier tokens.

    Returns:
        w and g [B, T, C] in fp32 at least; w = 1 and g = 0 at the first token of a document.

    Source: Peng et al. 2022, ABC: Attention with Bounded-memory Control, section 3.

    >>> weights, decays = cumulative_softmax(torch.zeros(1, 3, 1), SequenceInfo.make(1, 3, torch.device("cpu")))
    >>> weights.flatten(), decays.exp().flatten()
    (tensor([1.0000, 0.5000, 0.3333]), tensor([1.0000, 0.5000, 0.6667]))
    """
    logits_BTC = wide(logits_BTC)
    largest_BTC, before_BTC = scan_maxima(logits_BTC, torch.zeros_like(logits_BTC), seq, state)
    start = {} if state is None or "sums" not in state.tensors else {"sums": state.tensors["sums"]}
    sums_BTC = scan_tokens((logits_BTC - largest_BTC).exp(), (before_BTC - largest_BTC).exp(), seq, state, "sums")
    last_BTC = previous_tokens(sums_BTC, seq, TensorState(start), "sums")
    first_BT1 = (seq.positions_BT == 0)[..., None]
    # Both from the distance to the logarithm of the sum so far: no two large numbers are subtracted.
    distance_BTC = logits_BTC - torch.where(first_BT1, 0.0, before_BTC)
    ahead_BTC = distance_BTC - torch.where(first_BT1, 1.0, last_BTC).log()
    return (torch.where(first_BT1, 1.0, ahead_BTC.sigmoid()),
            torch.where(first_BT1, 0.0, -F.softplus(ahead_BTC)))


def cumulative_softmax_traffic(rows: int, channels: int) -> list[ShardTraffic]:
    """Bytes that the softmax exchanges between shards of rows: the maxima, the sums, and the last sums again."""
    tail = FP32_BYTES * rows * channels
    return [maxima_traffic(rows, channels), scan_traffic(rows, channels), ShardTraffic("from_previous", tail, tail)]
