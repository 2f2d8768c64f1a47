"""Patterns of keys that a token of softmax attention may see, by name.

t and s are positions of a query and a key in one document, s <= t:

    chunk     s // size == t // size                                                   (Llama 4)
    strided   t - s < size, or (t - s) % size == 0                                      (Sparse Transformer, GPT-3)
    fixed     s // size == t // size, or s % size >= size - columns                     (Sparse Transformer)
    log       t - s < size, or t - s a power of two                                     (LogSparse)
    blocks    t - s < size, or s in the first `columns` blocks, or in one of `random`   (BigBird, Longformer)
              blocks before the query's, drawn once for each block of queries
    dilated   s // w_i == t // w_i and (t - s) % r_i == 0 for some i < branches,        (LongNet)
              w_i = size * factor^i, r_i = factor^i

Sources: Child et al. 2019, section 4.2; Li et al. 2019 (LogSparse), section 4.2; Zaheer et al. 2020 (BigBird),
section 2, and Beltagy et al. 2020 (Longformer), section 3, in causal form; Ding et al. 2023 (LongNet), section 3.2.
B rows, T tokens, S keys, N listed keys or blocks, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.dense_attention import heads_of_all_tokens
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import attention, selected_attention
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide

BLOCK, FACTOR = 64, 2  # default sizes, which a pattern that does not use them keeps
MaskKind = Literal["chunk", "strided", "fixed", "log", "blocks", "dilated"]
MAX_TOKENS = torch.iinfo(torch.int64).max  # largest length that positions can be compared with
HASH = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # odd factors that mix layer, block and draw


@dataclass(kw_only=True)
class MaskConfig:
    """Configuration of a pattern of visible keys.

    Args:
        kind: the pattern.
        size: tokens of a chunk, of the stride, or of the window.
        columns: `fixed`: last keys of each earlier chunk that are seen; `blocks`: first blocks that are seen.
        block: tokens of a block of `blocks`.
        random: `blocks`: blocks drawn for each block of queries; those drawn twice, or seen anyway, count once.
        branches: `dilated`: segments that each token lies in, the first of `size` tokens.
        factor: `dilated`: how much longer, and how much sparser, each segment is than the one before.
    """

    kind: MaskKind
    size: int
    columns: int = 0
    block: int = BLOCK
    random: int = 0
    branches: int = 1
    factor: int = FACTOR

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", "must be positive", got=self.size)
        require(self.block >= 1, "block", "must be positive", got=self.block)
        for key, kinds in (("columns", ("fixed", "blocks")), ("random", ("blocks",))):
            value = getattr(self, key)
            require(value >= 0, key, "must not be negative", got=value)
            require(value == 0 or self.kind in kinds, key, f"is not used by the mask {self.kind}", got=value,
                    expected=f"0, or kind {' or '.join(kinds)}")
        require(self.branches >= 1, "branches", "must be positive", got=self.branches)
        require(self.branches == 1 or self.kind == "dilated", "branches", f"is not used by the mask {self.kind}",
                got=self.branches, expected="1, or kind dilated")
        for key, kind, usual in (("block", "blocks", BLOCK), ("factor", "dilated", FACTOR)):
            require(self.kind == kind or getattr(self, key) == usual, key, f"is not used by the mask {self.kind}",
                    got=getattr(self, key), expected=f"{usual}, or kind {kind}")
        require(self.factor >= 2, "factor", "must be at least 2", got=self.factor)
        for key in ("size", "block"):
            require(getattr(self, key) <= MAX_TOKENS, key, "is too large", got=getattr(self, key),
                    expected=f"at most {MAX_TOKENS}")
        most = self._most_branches()
        require(self.branches <= most, "branches", "makes the longest segment too large", got=self.branches,
                expected=f"at most {most} with size={self.size} and factor={self.factor}")
        require(self.kind != "dilated" or self.size % self.factor == 0, "size", "must be a multiple of factor",
                got=self.size, expected=f"a multiple of {self.factor}")
        require(self.kind != "fixed" or 1 <= self.columns <= self.size, "columns", "must be keys of a chunk",
                got=self.columns, expected=f"1 to {self.size}")

    def _most_branches(self) -> int:
        """Largest number of branches whose longest segment has at most `MAX_TOKENS` tokens."""
        branches, segment = 1, self.size * self.factor
        while segment <= MAX_TOKENS:
            branches, segment = branches + 1, segment * self.factor
        return branches

    @property
    def kept_keys(self) -> int | None:
        """Newest keys that later tokens may see, their own included; None: all."""
        return {"chunk": self.size, "dilated": self._segments()[-1][0]}.get(self.kind)

    def _segments(self) -> list[tuple[int, int]]:
        """Tokens of each segment of `dilated`, and the distance of the keys that are seen in it."""
        return [(self.size * self.factor**i, self.factor**i) for i in range(self.branches)]

    def visible_keys(self, context_length: int) -> float:
        """Mean number of keys that a token of a causal sequence sees; of random blocks the most."""
        length, size = context_length, self.size
        chunks, rest = divmod(length, size)
        in_chunk = (chunks * size * (size + 1) + rest * (rest + 1)) / (2 * length)
        earlier_chunks = (size * chunks * (chunks - 1) / 2 + chunks * rest) / length
        if self.kind == "chunk":
            return in_chunk
        if self.kind == "dilated":
            return in_chunk + sum(
                (_mean_start(length, shorter) - _mean_start(length, segment)) / distance
                for (shorter, _), (segment, distance) in pairwise(self._segments()))
        if self.kind == "fixed":
            return in_chunk + self.columns * earlier_chunks
        window = count_visible_keys(length, size)
        if self.kind == "strided":
            return window + earlier_chunks
        if self.kind == "log":
            return window + sum(max(0, length - distance) / length for distance in _powers(size, length))
        return min(window + (self.columns + self.random) * self.block, count_visible_keys(length))

    def sees(self, t_T1: Tensor, s_S: Tensor, layer: int) -> Tensor:
        """Whether queries at positions t [T, 1] see keys at positions s [S]: bool [T, S].

        Args:
            t_T1: positions of queries in their document.
            s_S: positions of keys in the same document.
            layer: index of the layer, which random blocks depend on.

        Example:
            >>> mask, t = MaskConfig(kind="chunk", size=2), torch.arange(4)
            >>> mask.sees(t[:, None], t, layer=0).int().tolist()
            [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        """
        distance_TS, size = t_T1 - s_S, self.size
        if self.kind == "chunk":
            seen_TS = s_S // size == t_T1 // size
        elif self.kind == "fixed":
            seen_TS = (s_S // size == t_T1 // size) | (s_S % size >= size - self.columns)
        elif self.kind == "strided":
            seen_TS = (distance_TS < size) | (distance_TS % size == 0)
        elif self.kind == "log":
            seen_TS = (distance_TS < size) | (distance_TS & (distance_TS - 1) == 0)
        elif self.kind == "dilated":
            inside = [(s_S // segment == t_T1 // segment) & (distance_TS % step == 0)
                      for segment, step in self._segments()]
            seen_TS = torch.stack(inside).any(0)
        else:
            blocks_TN = self._listed_blocks(t_T1[:, 0], layer)
            listed_TS = (blocks_TN[:, None] == (s_S // self.block)[None, :, None]).any(-1)
            seen_TS = (distance_TS < size) | listed_TS
        return seen_TS & (distance_TS >= 0)

    def _listed_blocks(self, positions_T: Tensor, layer: int) -> Tensor:
        """First and random blocks that queries see, [T, N] or with other leading dims; -1 for none, each once."""
        own = (positions_T // self.block)[..., None]
        first = torch.arange(self.columns, device=own.device).expand(*own.shape[:-1], -1)
        draw = torch.arange(self.random, device=own.device)
        hashed = (layer * HASH[0] + own * HASH[1] + draw * HASH[2]) * HASH[1]
        drawn = (hashed >> 15) % own.clamp(min=1)
        listed = torch.cat([first, drawn], -1)
        listed = torch.where(listed <= own, listed, -1)
        earlier = (listed[..., :, None] == listed[..., None, :]).tril(-1).any(-1)
        return torch.where(earlier, -1, listed)


def masked_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seq: SequenceInfo, mask: MaskConfig, *,
                     layer: int, sinks_H: Tensor | None = None, seen: int | None = None) -> Tensor:
    """Softmax attention to the keys that a pattern lets see.

    A chunk is a document to `attention`; the other patterns list keys or blocks for `selected_attention`. While
    decoding, the scores of all kept keys are computed and masked.

    Args:
        q_BTHK: queries.
        k_BSGK: keys; with `seen` those that a decode state keeps.
        v_BSGV: values.
        seq: positions and borders of the documents.
        mask: the pattern.
        layer: index of the layer.
        sinks_H: logits of attention sinks.
        seen: tokens of each row so far, the new ones included, while decoding; None: keys are those of the queries.

    Returns:
        Outputs [B, T, H, V].
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if seen is not None and seen != T:
        t_T1 = torch.arange(seen - T, seen, device=q_BTHK.device)[:, None]
        s_S = torch.arange(seen - S, seen, device=q_BTHK.device)
        return attend_seen(q_BTHK, k_BSGK, v_BSGV, mask.sees(t_T1, s_S, layer), sinks_H)
    shard = seq.shard
    if shard is None:
        return _complete_rows(q_BTHK, k_BSGK, v_BSGV, seq.cu_seqlens, mask, layer, sinks_H)
    q, k, v = heads_of_all_tokens(shard, [q_BTHK], [k_BSGK, v_BSGV])
    sinks = None if sinks_H is None else shard.local_heads(sinks_H)
    return shard.by_tokens(_complete_rows(q, k, v, shard.borders, mask, layer, sinks))


def attend_seen(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seen_TS: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Softmax attention to the keys of a table bool [T, S], with all scores in memory, in fp32 at least."""
    q_BTGrK = wide(q_BTHK).unflatten(2, (k_BSGK.shape[2], -1)) * q_BTHK.shape[-1] ** -0.5
    score_BGrTS = torch.einsum("btgrk,bsgk->bgrts", q_BTGrK, wide(k_BSGK)).masked_fill(~seen_TS, -torch.inf)
    if sinks_H is not None:
        sink_Gr11 = wide(sinks_H).view(*score_BGrTS.shape[1:3], 1, 1)
        score_BGrTS = torch.cat([score_BGrTS, sink_Gr11.expand(*score_BGrTS.shape[:4], 1)], -1)
    weight_BGrTS = score_BGrTS.softmax(-1)[..., : k_BSGK.shape[1]]
    o_BTGrV = torch.einsum("bgrts,bsgv->btgrv", weight_BGrTS, wide(v_BSGV))
    return o_BTGrV.flatten(2, 3).to(v_BSGV.dtype)


def _complete_rows(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, borders: CuSeqlens | None, mask: MaskConfig,
                   layer: int, sinks_H: Tensor | None) -> Tensor:
    B, T = q_BTHK.shape[:2]
    if mask.kind == "chunk":
        return attention(q_BTHK, k_BTGK, v_BTGV, sinks_H=sinks_H, cu_seqlens=_chunk_borders(borders, B, T, mask.size))
    position_T = torch.arange(T, device=q_BTHK.device)
    positions_BT = position_T.expand(B, T) if borders is None else borders.positions().view(B, T)
    start_BT1 = (position_T - positions_BT)[..., None]
    if mask.kind == "blocks":
        blocks_BT1N = mask._listed_blocks(positions_BT, layer)[:, :, None]
        if blocks_BT1N.shape[-1] == 0:
            blocks_BT1N = blocks_BT1N.new_full((B, T, 1, 1), -1)
        return selected_attention(q_BTHK, k_BTGK, v_BTGV, blocks_BT1N, block=mask.block, window=mask.size,
                                  sinks_H=sinks_H, cu_seqlens=borders)[0]
    # The lengths of documents would make a graph of their own for each packing: the bound of a row lists more, unseen.
    longest = T if borders is None or torch.compiler.is_dynamo_compiling() else max(borders.lengths)
    if mask.kind == "fixed":
        chunk_J = torch.arange(math.ceil(longest / mask.size), device=q_BTHK.device)
        column_N = (chunk_J[:, None] * mask.size + torch.arange(mask.size - mask.columns, mask.size,
                                                                device=q_BTHK.device)).flatten()
        own_BT1 = positions_BT[..., None] // mask.size
        listed_BTN = torch.where(column_N // mask.size < own_BT1, column_N, -1)
        in_chunk = torch.where(torch.arange(mask.size, device=q_BTHK.device) <= positions_BT[..., None] % mask.size,
                               own_BT1 * mask.size + torch.arange(mask.size, device=q_BTHK.device), -1)
        listed_BTN, window = torch.cat([in_chunk, listed_BTN], -1), None
    elif mask.kind == "dilated":
        listed_BTN, window = _dilated_keys(positions_BT[..., None], mask, longest), None
    else:
        steps = _powers(mask.size, longest) if mask.kind == "log" else range(mask.size, longest, mask.size)
        distance_N = torch.tensor([*steps] or [longest], device=q_BTHK.device)
        listed_BTN, window = (positions_BT[..., None] - distance_N).clamp(min=-1), mask.size
    indices_BT1N = torch.where(listed_BTN >= 0, listed_BTN + start_BT1, -1)[:, :, None]
    return selected_attention(q_BTHK, k_BTGK, v_BTGV, indices_BT1N, window=window, sinks_H=sinks_H,
                              cu_seqlens=borders)[0]


def _dilated_keys(positions_BT1: Tensor, mask: MaskConfig, longest: int) -> Tensor:
    """Keys of `dilated` [B, T, N], -1 for none, each once: of a longer segment those before the shorter one."""
    found, stop_BT1 = [], positions_BT1 + 1
    for segment, step in mask._segments():
        begin_BT1 = positions_BT1 // segment * segment
        place_N = torch.arange(min(mask.size, math.ceil(longest / step)), device=positions_BT1.device) * step
        key_BTN = begin_BT1 + positions_BT1 % step + place_N
        found.append(torch.where(key_BTN < stop_BT1, key_BTN, -1))
        stop_BT1 = begin_BT1
    return torch.cat(found, -1)


def _mean_start(length: int, segment: int) -> float:
    """Mean over the tokens of a sequence of the first position of the segment that each lies in.

    >>> _mean_start(4, 2)
    1.0
    """
    whole, rest = divmod(length, segment)
    return segment * (segment * whole * (whole - 1) / 2 + whole * rest) / length


def _chunk_borders(borders: CuSeqlens | None, rows: int, length: int, size: int) -> CuSeqlens | None:
    """Borders of the chunks of all documents; None where every row is one chunk."""
    if borders is None and length <= size:
        return None
    if torch.compiler.is_dynamo_compiling():
        return _traced_chunks(borders, rows, length, size)
    if borders is None:
        documents, cache = tuple(range(0, (rows + 1) * length, length)), None
        device = torch.device("cpu")
    else:
        documents, cache, device = borders.host, borders.cache, borders.device
        if f"chunks {size}" in cache:
            return cache[f"chunks {size}"]
    starts = [start for begin, end in pairwise(documents) for start in range(begin, end, size)]
    chunks = CuSeqlens([*starts, documents[-1]], device)
    if cache is not None:
        cache[f"chunks {size}"] = chunks
    return chunks


def _traced_chunks(borders: CuSeqlens | None, rows: int, length: int, size: int) -> CuSeqlens:
    """Borders of the chunks while torch.compile traces: as many as there can be, the last ones empty."""
    tokens = rows * length
    table_N = torch.arange(0, tokens + 1, length) if borders is None else borders.table
    token_T = torch.arange(tokens)
    start_T = table_N[torch.searchsorted(table_N, token_T, right=True) - 1]
    chunk_T = ((token_T - start_T) % size == 0).long().cumsum(0) - 1
    starts = torch.full((table_N.shape[0] + tokens // size + 1,), tokens).scatter_reduce(0, chunk_T, token_T, "amin")
    return CuSeqlens.of(starts, "cpu" if borders is None else borders.device, tokens)


def _powers(least: int, below: int) -> list[int]:
    """Powers of two from `least` on that are smaller than `below`."""
    return [power for power in (2**exponent for exponent in range(below.bit_length())) if least <= power < below]
