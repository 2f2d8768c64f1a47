"""Softmax over the tokens so far, per channel, as write weights and decays of a recurrence (ABC, LightNet).

B rows, T tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.model.decode_state import TensorState
from hybridlm.model.mixers.common.scan import scan_tokens
from hybridlm.model.mixers.common.token_shift import previous_tokens
from hybridlm.model.sequence import SequenceInfo


def cumulative_softmax(logits_BTC: Tensor, seq: SequenceInfo,
                       state: TensorState | None = None) -> tuple[Tensor, Tensor]:
    """Write weights and decays by which a state holds the average of its writes, weighted by the softmax of all logits.

        z_t = log(e^{s_1} + ... + e^{s_t});   w_t = e^{s_t - z_t};   g_t = z_{t-1} - z_t
        S_t = e^{g_t} S_{t-1} + w_t v_t   is then   sum_{j<=t} e^{s_j - z_t} v_j

    No maximum over the row is taken, so that a token sees no later one; exponentials have to fit fp32.

    Args:
        logits_BTC: logits s, bounded to some tens either way.
        seq: borders of the documents, at each of which the softmax starts anew, and the shard of the rows held here.
        state: decode state that holds the sums of the earlier tokens.

    Returns:
        w and g [B, T, C] in fp32 at least; w = 1 and g = 0 at the first token of a document.

    Source: Peng et al. 2022, ABC: Attention with Bounded-memory Control, section 3.

    >>> weights, decays = cumulative_softmax(torch.zeros(1, 3, 1), SequenceInfo.make(1, 3, torch.device("cpu")))
    >>> weights.flatten(), decays.exp().flatten()
    (tensor([1.0000, 0.5000, 0.3333]), tensor([1.0000, 0.5000, 0.6667]))
    """
    logits_BTC = logits_BTC.to(torch.promote_types(logits_BTC.dtype, torch.float32))
    weights_BTC = logits_BTC.exp()
    sums_BTC = scan_tokens(weights_BTC, torch.ones_like(weights_BTC), seq, state, "sums")
    before_BTC = previous_tokens(sums_BTC, seq, state, "sum_before")
    first_BT1 = (seq.positions_BT == 0)[..., None]
    # Both from the distance to the sum so far: no two large numbers are subtracted.
    ahead_BTC = logits_BTC - torch.where(first_BT1, 1.0, before_BTC).log()
    return (torch.where(first_BT1, 1.0, ahead_BTC.sigmoid()),
            torch.where(first_BT1, 0.0, -F.softplus(ahead_BTC)))
