"""Softmax attention to all keys, over complete rows or rows that are divided into shards.

B rows, T tokens, S keys, H query heads, G key/value heads, K/V key/value dim.
"""

from __future__ import annotations

import math

from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.decode_step import attend_one
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import attention


def check_heads(heads: int, shards: int) -> None:
    """Raise ConfigError unless the number of heads is a multiple of the number of shards."""
    require(heads % shards == 0, "num_heads", "must divide among the processes that share a row", got=heads,
            expected=f"a multiple of {shards}", hint="engine.context_parallel says how many these are")


def dense_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seq: SequenceInfo, *, scale: float | None = None,
                    window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:
    """Compute softmax attention, exchanging tokens for heads where rows are divided into shards.

    With shards each process computes some of the heads for all tokens (Ulysses, Jacobs et al. 2023). Key/value
    heads are repeated where their number is no multiple of the number of shards.

    Args:
        q_BTHK: queries [B, T, H, K] of the tokens held here.
        k_BSGK: keys [B, S, G, K].
        v_BSGV: values [B, S, G, V].
        seq: positions and borders of the documents.
        scale: factor of the scores; None: K^-0.5.
        window: keys that a token sees, itself included; None: all.
        sinks_H: logits [H] of attention sinks.

    Returns:
        Outputs [B, T, H, V].
    """
    shard = seq.shard
    if seq.padding_B is not None:
        if q_BTHK.shape[1] != 1 or sinks_H is not None:
            raise ValueError("rows that hold unlike numbers of tokens are decoded one token per row, without sinks")
        return attend_one(q_BTHK[:, 0], k_BSGK, v_BSGV, seq, scale)[:, None]
    if shard is None:
        return attention(q_BTHK, k_BSGK, v_BSGV, scale=scale, window=window, sinks_H=sinks_H, cu_seqlens=seq.cu_seqlens)
    groups = k_BSGK.shape[2]
    copies = math.lcm(groups, shard.group.size) // groups
    if copies > 1:
        k_BSGK, v_BSGV = k_BSGK.repeat_interleave(copies, 2), v_BSGV.repeat_interleave(copies, 2)
    q, k, v = shard.by_heads(q_BTHK, k_BSGK, v_BSGV)
    o = attention(q, k, v, scale=scale, window=window, sinks_H=None if sinks_H is None else shard.local_heads(sinks_H),
                  cu_seqlens=shard.borders)
    return shard.by_tokens(o)
