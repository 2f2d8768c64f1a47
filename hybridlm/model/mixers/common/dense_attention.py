"""Softmax attention to all keys, over complete rows or rows that are divided into shards.

B rows, T tokens, S keys, H query heads, G key/value heads, K/V key/value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.context_parallel import RowShard
from hybridlm.model.decode_step import attend_one
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import attention
from hybridlm_kernels.packing import CuSeqlens


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one softmax attention over undivided rows, without a decode state.

    Args:
        q_BTHK: queries.
        k_BSGK: keys, as many tokens as queries.
        v_BSGV: values.
        cu_seqlens: borders of the documents; None where each row is one.
        scale: factor of the scores.
        window: keys that a token sees, itself included; None: all.
        sinks_H: logits of attention sinks.
    """

    q_BTHK: Tensor
    k_BSGK: Tensor
    v_BSGV: Tensor
    cu_seqlens: CuSeqlens | None
    scale: float
    window: int | None
    sinks_H: Tensor | None


_replacement: ContextVar[Callable[[AttentionCall], Tensor] | None] = ContextVar("attention", default=None)


@contextmanager
def replaced_attention(attend: Callable[[AttentionCall], Tensor]) -> Iterator[None]:
    """Context in which `attend` computes softmax attention to all keys or a window, in all layers, in their order.

    For evaluations that try another attention on a trained model. Steps with a decode state are not replaced.

    Args:
        attend: returns outputs [B, T, H, V] for a call.
    """
    token = _replacement.set(attend)
    try:
        yield
    finally:
        _replacement.reset(token)


def check_heads(heads: int, shards: int) -> None:
    """Raise ConfigError unless the number of heads is a multiple of the number of shards."""
    require(heads % shards == 0, "num_heads", "must divide among the processes that share a row", got=heads,
            expected=f"a multiple of {shards}", hint="engine.context_parallel says how many these are")


def dense_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seq: SequenceInfo, *, scale: float | None = None,
                    window: int | None = None, sinks_H: Tensor | None = None) -> Tensor:
    """Compute softmax attention, exchanging tokens for heads where rows are divided into shards.

    With shards each process computes some of the heads for all tokens (Ulysses, Jacobs et al. 2023).

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
    attend = None if torch.compiler.is_dynamo_compiling() else _replacement.get()
    if attend is not None and shard is None and q_BTHK.shape[1] == k_BSGK.shape[1]:
        scale = q_BTHK.shape[3] ** -0.5 if scale is None else scale
        return attend(AttentionCall(q_BTHK, k_BSGK, v_BSGV, seq.cu_seqlens, scale, window, sinks_H))
    if shard is None:
        return attention(q_BTHK, k_BSGK, v_BSGV, scale=scale, window=window, sinks_H=sinks_H, cu_seqlens=seq.cu_seqlens)
    q, k, v = heads_of_all_tokens(shard, [q_BTHK], [k_BSGK, v_BSGV])
    o = attention(q, k, v, scale=scale, window=window, sinks_H=None if sinks_H is None else shard.local_heads(sinks_H),
                  cu_seqlens=shard.borders)
    return shard.by_tokens(o)


def heads_of_all_tokens(shard: RowShard, query_heads: Sequence[Tensor], key_heads: Sequence[Tensor]) -> list[Tensor]:
    """Exchange tokens for heads (Ulysses): all tokens of those heads that this process computes.

    Key/value heads are repeated where their number is no multiple of the number of shards.

    Args:
        shard: the shard of the rows held here.
        query_heads: tensors [B, L, H, *] with one entry per query head, of one dtype with the others.
        key_heads: tensors [B, L, G, *] with one entry per key/value head.

    Returns:
        The tensors [B, T, H / P, *], then those of the key/value heads; `shard.by_tokens` brings outputs back.
    """
    groups = key_heads[0].shape[2] if key_heads else 1
    copies = math.lcm(groups, shard.group.size) // groups
    if copies > 1:
        key_heads = [x.repeat_interleave(copies, 2) for x in key_heads]
    return shard.by_heads(*query_heads, *key_heads)


def attention_exchange_size(heads: int, groups: int, dim: int, shards: int) -> int:
    """Numbers per token that attention over `shards` exchanges: q, k and v of all tokens, and the outputs back.

    >>> attention_exchange_size(heads=4, groups=1, dim=8, shards=2)
    96
    """
    return 2 * (heads + math.lcm(groups, shards)) * dim
