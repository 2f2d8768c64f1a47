"""State matrices of linear mixers: linear attention from a decode state or an earlier shard on, and its exchange.

B rows, T tokens, H query/key heads, HV value heads, K key dim, V value dim, N documents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.model.context_parallel import RowShard
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import linear_attention
from hybridlm_kernels.recurrence.arguments import math_dtype

FP32_BYTES = 4  # bytes per element


def scan_matrix_state(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, seq: SequenceInfo,
                      state: TensorState | None = None, scale: float = 1.0, name: str = "matrix",
                      rows: int = 1) -> Tensor:
    """Linear attention over the tokens of each document, from the decode state or an earlier shard on.

    Args:
        q_BTHK: queries, activated.
        k_BTHK: keys, activated; one head serves HV / H value heads.
        v_BTHvV: values, activated.
        g: logarithm of the decay, as the operation takes it without a gate; None where nothing decays.
        seq: borders of the documents, and the shard of the rows held here.
        state: decode state that holds the last state matrix under `name`, and then that of this call.
        scale: factor on the queries.
        name: key of the matrix in the state.
        rows: rows R of q, k and v per token, [B, T R, ...], which write and read one after the other. The decay, which
            is then one per token, acts at the first of them.

    Returns:
        o [B, T, HV, V] in the dtype of v; T R where there are several rows per token.

    >>> ones = torch.ones(1, 3, 1, 1)
    >>> half = torch.full((1, 3, 1), 0.5).log()
    >>> scan_matrix_state(ones, ones, ones, half, SequenceInfo.make(1, 3, ones.device)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    start = None if state is None else state.tensors.get(name)
    borders = seq.cu_seqlens
    row_g = g
    if rows > 1:
        borders = None if borders is None else borders.in_rows(rows)
        row_g = None if g is None else F.pad(g[:, :, None], (*(0, 0) * (g.dim() - 2), 0, rows - 1)).flatten(1, 2)
    o_BTHvV, matrix_NHvKV = linear_attention(q_BTHK, k_BTHK, v_BTHvV, g=row_g, scale=scale, cu_seqlens=borders,
                                             initial_state=start,
                                             final_state=state is not None or seq.shard is not None)
    if state is not None:
        state.tensors[name] = matrix_NHvKV
    if seq.shard is None:
        return o_BTHvV
    left_BTHvX = compute_decay_from_start(g, matrix_NHvKV.dtype, seq.shard)
    incoming_BHvKV = seq.shard.incoming(seq.shard.at_end(matrix_NHvKV), left_BTHvX[:, -1, :, :, None], torch.mul)
    q_BTHvK = q_BTHK.to(incoming_BHvKV.dtype).repeat_interleave(v_BTHvV.shape[2] // q_BTHK.shape[2], 2)
    left_BTHvX = left_BTHvX.repeat_interleave(rows, 1) if rows > 1 else left_BTHvX
    return o_BTHvV + (read_incoming_state(q_BTHvK * left_BTHvX, incoming_BHvKV) * scale).to(o_BTHvV.dtype)


def matrix_traffic(rows: int, heads: int, key_dim: int, value_dim: int, decays: int) -> ShardTraffic:
    """Bytes of the state matrices at the end of a shard, and of the decays of those at its start.

    Args:
        rows: rows of a micro batch.
        heads: value heads.
        key_dim: rows of a state.
        value_dim: columns of a state.
        decays: decays of all heads together.
    """
    sent = rows * FP32_BYTES * (heads * key_dim * value_dim + decays)
    return ShardTraffic("gather", sent, sent)


def read_incoming_state(reach_BTHvK: Tensor, incoming_BHvKV: Tensor) -> Tensor:
    """Read the state at the start of the shard with queries.

    Args:
        reach_BTHvK: the queries as they act on that state, after all decays and updates between it and them.
        incoming_BHvKV: the state that the earlier shards leave.

    Returns:
        The reads, [B, T, HV, V].
    """
    with torch.autocast(reach_BTHvK.device.type, enabled=False):
        return torch.einsum("bthk,bhkv->bthv", reach_BTHvK.to(incoming_BHvKV.dtype), incoming_BHvKV)


def compute_decay_from_start(g: Tensor | None, dtype: torch.dtype, shard: RowShard) -> Tensor:
    """The factor [B, T, HV, K] by which the state at the start of the shard has decayed at each token.

    It is 0 for documents that begin in the shard. HV and K are 1 where all heads or channels decay alike.

    Args:
        g: the logarithm of the decay as the operation takes it; None where nothing decays.
        dtype: that of the result.
        shard: this process's shard of the rows.
    """
    if g is None:
        log_BTHvK = torch.zeros(1, 1, 1, 1, dtype=dtype, device=shard.positions_BL.device)
    elif g.dim() == 1:
        steps_T1 = torch.arange(1, shard.length + 1, device=g.device)[:, None]
        log_BTHvK = (g.to(dtype) * steps_T1)[None, :, :, None]
    else:
        log_BTHvK = g.to(dtype).cumsum(1)
        log_BTHvK = log_BTHvK if g.dim() == 4 else log_BTHvK[..., None]
    return torch.where(shard.continued_tokens()[:, :, None, None], log_BTHvK, -torch.inf).exp()


def run_over_shards(rule: Callable[..., tuple[Tensor, Tensor]], v_BTHvV: Tensor, key_dim: int,
                    shard: RowShard) -> Tensor:
    """The outputs [B, T, HV, V] of the delta rule over rows that are divided into shards, by one pass over each.

    The columns of a state do not mix, and the rule is linear in them. V columns start at zero and take the values: N.
    K more start as the identity and take none: M, a product of transitions such as Diag(e^g) - beta k k^T. With the
    state S that the earlier shards leave, the states here are N_t + M_t S, and the outputs those of N_t plus S^T times
    those of M_t.

    Args:
        rule: the operation, given values [B, T, HV, V] and `initial_state`.
        v_BTHvV: values of this shard; n rows of them per token where `rule` writes n times.
        key_dim: K.
        shard: this process's shard of the rows.
    """
    batch, _, heads, width = v_BTHvV.shape
    eye_BHvKK = torch.eye(key_dim, dtype=math_dtype(v_BTHvV), device=v_BTHvV.device).expand(batch, heads, -1, -1)
    eye_BHvKK = eye_BHvKK * shard.continues_B[:, None, None, None]
    start = shard.at_start(F.pad(eye_BHvKK, (width, 0)))
    o_BTHvX, state_NHvKX = rule(F.pad(v_BTHvV, (0, key_dim)), initial_state=start)
    local_BHvKV, through_BHvKK = shard.at_end(state_NHvKX).split([width, key_dim], -1)
    incoming_BHvKV = shard.incoming(local_BHvKV, through_BHvKK, torch.matmul)
    o_BTHvV, reach_BTHvK = o_BTHvX.split([width, key_dim], -1)
    return o_BTHvV + read_incoming_state(reach_BTHvK, incoming_BHvKV).to(o_BTHvV.dtype)
