"""The recurrence of mLSTM: a matrix state with an exponential input gate, a forget gate and a normaliser.

    C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T,   n_t = f_t n_{t-1} + e^{i_t} k_t,   f = sigmoid(f~)
    h_t = C_t^T q_t / max(|n_t . q_t|, 1),   q scaled by K^-1/2

The exponential needs a divisor e^{m_t}, m_t = max(log f_t + m_{t-1}, i_t, 0), and h does not depend on it. Divided by
it, C with n as one more column is linear attention with decay: of keys e^{i_t - m_t} k_t and logarithms of decays
log f_t + m_{t-1} - m_t, both factors at most 1.
Source: Beck et al. 2024, xLSTM, section 2.3 and appendix A.

B rows, T tokens, H heads, K dims of queries and keys, V dims of values, N documents, P pieces of the values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.mixers.common.matrix_state import compute_decay_from_start, read_incoming_state
from hybridlm.model.mixers.common.scan import maxima_traffic, scan_maxima
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import linear_attention

FP32_BYTES = 4  # bytes per element
CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations
MAX_COLUMNS = 256  # columns of the state in one value head of the operation; more are divided among several


def divide_columns(value_dim: int) -> tuple[int, int]:
    """Value heads of the operation per head of the mixer, and columns of each: together at least V + 1.

    >>> divide_columns(64), divide_columns(512)
    ((1, 65), (3, 171))
    """
    pieces = -(-(value_dim + 1) // MAX_COLUMNS)
    return pieces, -(-(value_dim + 1) // pieces)


def read_exponential_state(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, i_BTH: Tensor, f_BTH: Tensor,
                           seq: SequenceInfo, state: TensorState | None = None) -> Tensor:
    """Run the recurrence of mLSTM over each document.

    Args:
        q_BTHK: queries, not scaled.
        k_BTHK: keys.
        v_BTHV: values.
        i_BTH: logarithm of the input gate.
        f_BTH: the forget gate before its sigmoid.
        seq: borders of the documents, and the shard of the rows held here.
        state: decode state, which keeps `matrix` and `max`.

    Returns:
        h [B, T, H, V] in the dtype of v.

    >>> ones, seq = torch.ones(1, 2, 1, 1), SequenceInfo.make(1, 2, torch.device("cpu"))
    >>> h = read_exponential_state(ones, ones, 3.0 * ones, ones[..., 0], ones[..., 0], seq)
    >>> h.flatten()  # the mean of the values, where the normaliser is above 1
    tensor([3., 3.])
    """
    H, V = v_BTHV.shape[2:]
    dtype = v_BTHV.dtype
    wide = torch.promote_types(dtype, torch.float32)
    i_BTH, g_BTH = i_BTH.to(wide), F.logsigmoid(f_BTH.to(wide))
    # A sum is never below the 1 of its divisor, so neither is m below 0: e^-m cannot overflow.
    m_BTH, before_BTH = scan_maxima(i_BTH.clamp(min=0.0), g_BTH, seq, state)
    decay_BTH = g_BTH + before_BTH.clamp(min=0.0) - m_BTH
    k_BTHK = (k_BTHK * (i_BTH - m_BTH).exp()[..., None]).to(dtype)
    pieces, columns = divide_columns(V)
    v_BTPX = F.pad(F.pad(v_BTHV, (0, 1), value=1.0), (0, pieces * columns - V - 1)).unflatten(-1, (pieces, columns))
    v_BTPX = v_BTPX.flatten(2, 3)
    decay_BTP = decay_BTH.repeat_interleave(pieces, 2)
    start = None if state is None else state.tensors.get("matrix")
    o_BTPX, matrix_NPKX = linear_attention(q_BTHK, k_BTHK, v_BTPX, g=decay_BTP, cu_seqlens=seq.cu_seqlens,
                                           initial_state=start,
                                           final_state=state is not None or seq.shard is not None)
    if state is not None:
        state.tensors["matrix"] = matrix_NPKX
    if seq.shard is not None:
        left_BTP1 = compute_decay_from_start(decay_BTP, matrix_NPKX.dtype, seq.shard)
        incoming_BPKX = seq.shard.incoming(seq.shard.at_end(matrix_NPKX), left_BTP1[:, -1, :, :, None], torch.mul)
        q_BTPK = (q_BTHK.to(incoming_BPKX.dtype) * q_BTHK.shape[-1] ** -0.5).repeat_interleave(pieces, 2)
        o_BTPX = o_BTPX + read_incoming_state(q_BTPK * left_BTP1, incoming_BPKX).to(o_BTPX.dtype)
    o_BTHX = o_BTPX.unflatten(2, (H, pieces)).flatten(-2).to(wide)
    total_BTH1 = o_BTHX[..., V : V + 1].abs()
    return (o_BTHX[..., :V] / torch.maximum(total_BTH1, (-m_BTH).exp()[..., None])).to(dtype)


def count_state(heads: int, key_dim: int, value_dim: int) -> int:
    """Numbers in the decode state: the matrix with the normaliser, and the maximum, of every head."""
    pieces, columns = divide_columns(value_dim)
    return heads * (key_dim * pieces * columns + 1)


def count_activations(heads: int, key_dim: int, value_dim: int) -> float:
    """Numbers per token that the recurrence keeps for its backward pass, in fp32."""
    chunk = heads * (key_dim * (value_dim + 1) / CHUNK_TOKENS + 2 * CHUNK_TOKENS)
    return heads * (5 * key_dim + 6 * value_dim + 12) + chunk


def state_traffic(rows: int, heads: int, key_dim: int, value_dim: int) -> list[ShardTraffic]:
    """Bytes that the recurrence exchanges between shards of rows: the maxima, then the state with its decay."""
    pieces, columns = divide_columns(value_dim)
    sent = rows * FP32_BYTES * heads * pieces * (key_dim * columns + 1)
    return [maxima_traffic(rows, heads), ShardTraffic("gather", sent, sent)]


@torch.no_grad()
def init_gates(i_weight: Tensor, f_weight: Tensor, f_bias_H: Tensor) -> None:
    """Zero the weights of both gates; the biases of the forget gates rise from 3 to 6 over the heads."""
    nn.init.zeros_(i_weight)
    nn.init.zeros_(f_weight)
    f_bias_H.copy_(torch.linspace(3.0, 6.0, len(f_bias_H)))
