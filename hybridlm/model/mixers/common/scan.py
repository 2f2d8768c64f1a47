"""Scans of mixers with one number per channel, linear and of maxima: decode state, documents, and shards of rows.

B rows, T tokens, C channels, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.context_parallel import RowShard
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import linear_scan, max_scan

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


@torch.no_grad()
def scan_maxima(x_BTC: Tensor, g_BTC: Tensor, seq: SequenceInfo, state: TensorState | None = None,
                name: str = "max") -> tuple[Tensor, Tensor]:
    """Scan m_t = max(m_{t-1} + g_t, x_t) over the tokens of each document; without gradient.

    Args:
        x_BTC: logarithms of what each token adds to a sum.
        g_BTC: logarithms of its decay, at most 0.
        seq: borders of the documents, and the shard of the rows held here.
        state: decode state that holds the last m under `name`, and then that of this call.
        name: key of m in the state.

    Returns:
        m [B, T, C], and m before each token [B, T, C], -inf for the first token of a document; in fp32 at least.

    >>> x = torch.tensor([0.0, -5.0, 1.0]).view(1, 3, 1)
    >>> m, before = scan_maxima(x, torch.full_like(x, -2.0), SequenceInfo.make(1, 3, x.device))
    >>> m.flatten(), before.flatten()
    (tensor([ 0., -2.,  1.]), tensor([-inf, 0., -2.]))
    """
    start = None if state is None else state.tensors.get(name)
    m_BTC, end_NC = max_scan(x_BTC, g_BTC, initial_state=start, cu_seqlens=seq.cu_seqlens)
    if state is not None:
        state.tensors[name] = end_NC
    if seq.shard is not None:
        continued_BT1 = seq.shard.continued_tokens()[..., None]
        sums_BTC = torch.where(continued_BT1, g_BTC.to(m_BTC.dtype).cumsum(1), -torch.inf)
        start = _incoming_maxima(seq.shard.at_end(end_NC), sums_BTC[:, -1], seq.shard)
        m_BTC = torch.maximum(m_BTC, sums_BTC + start[:, None])
    first_B1C = torch.full_like(m_BTC[:, :1], -torch.inf) if start is None else start[:, None].to(m_BTC.dtype)
    before_BTC = torch.cat([first_B1C, m_BTC[:, :-1]], 1)
    return m_BTC, torch.where((seq.positions_BT > 0)[..., None], before_BTC, -torch.inf)


def _incoming_maxima(local_BC: Tensor, sums_BC: Tensor, shard: RowShard) -> Tensor:
    """The maximum [B, C] at the start of the shard, from those of each shard and its sum of logarithms of decays."""
    local_PBC, sums_PBC = shard.group.gather(torch.stack([local_BC, sums_BC])).unbind(1)
    found_BC = torch.full_like(local_BC, -torch.inf)
    for earlier in range(shard.group.rank):
        found_BC = torch.maximum(found_BC + sums_PBC[earlier], local_PBC[earlier])
    return torch.where(shard.continues_B[:, None], found_BC, -torch.inf)


def maxima_traffic(rows: int, channels: int) -> ShardTraffic:
    """Bytes of the maxima at the end of a shard and of the sums of its decays; they have no backward."""
    return ShardTraffic("gather", 2 * FP32_BYTES * rows * channels, 0)
