"""The linear scan of mixers whose state is one number per channel: decode state, documents, and shards of rows.

B rows, T tokens, C channels, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import linear_scan

FP32_BYTES = 4  # bytes per element


def scan_tokens(x_BTC: Tensor, a_BTC: Tensor, seq: SequenceInfo, state: TensorState | None = None,
                name: str = "h") -> Tensor:
    """Scan h_t = a_t h_{t-1} + x_t over the tokens of each document, from the decode state or an earlier shard on.

    Args:
        x_BTC: inputs, real or complex.
        a_BTC: factors of absolute value at most 1.
        seq: borders of the documents, and the shard of the rows held here.
        state: decode state that holds the last h under `name`, and then that of this call.
        name: key of h in the state.

    Returns:
        h [B, T, C] in fp32 at least.

    >>> ones = torch.ones(1, 3, 1)
    >>> scan_tokens(ones, 0.5 * ones, SequenceInfo.make(1, 3, ones.device)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    start = None if state is None else state.tensors.get(name)
    h_BTC, end_NC = linear_scan(x_BTC, a_BTC, initial_state=start, cu_seqlens=seq.cu_seqlens)
    if state is not None:
        state.tensors[name] = end_NC
    if seq.shard is None:
        return h_BTC
    shard = seq.shard
    # From ones and without inputs the scan gives the factor by which a state at the start of the shard arrives.
    ones_BC = torch.ones_like(shard.at_end(end_NC)) * shard.continues_B[:, None]
    left_BTC, left_NC = linear_scan(torch.zeros_like(x_BTC), a_BTC, initial_state=shard.at_start(ones_BC),
                                    cu_seqlens=seq.cu_seqlens)
    added_B1C1, left_B1C1 = (shard.at_end(ends)[:, None, :, None] for ends in (end_NC, left_NC))
    incoming_B1C1 = shard.incoming(added_B1C1, left_B1C1, torch.mul)
    return h_BTC + left_BTC * incoming_B1C1[..., 0]


def scan_traffic(rows: int, channels: int) -> ShardTraffic:
    """Bytes of the states at the end of a shard, and of what is left there of those at its start; reals."""
    sent = 2 * FP32_BYTES * rows * channels
    return ShardTraffic("gather", sent, sent)
