"""Native sparse attention: compressed entries, selected blocks and a window, joined by gates.

    o_t = g1 Attn(q_t; entries of complete windows) + g2 Attn(q_t; selected blocks) + g3 Attn(q_t; last w tokens)
    g = sigmoid(W_g x_t + b), three per head;   y_t = W_o o_t

Blocks are selected per key/value head: p = softmax(q . keys of entries), summed over the windows that overlap a block
and over the heads that share a key head. The selection has no gradient: it learns through the entries' own output.

Source: Yuan et al. 2025, NSA (arXiv 2502.11089), section 3. The paper projects keys and values for each branch, which
`branch_keys` does; by default the branches share them, as in public implementations.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim, E windows, L tokens of a window,
C sets of keys and values (3 or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import EntryCache, TokenCache
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.block_selection import BlockBudget, BlockIndex, choose_blocks
from hybridlm.model.mixers.common.compression import (
    Compression,
    Compressor,
    count_compression_flops,
    count_compression_params,
)
from hybridlm.model.mixers.common.cost import count_block_keys, count_visible_keys
from hybridlm.model.mixers.common.entries import EntryWindows, count_entries, count_seen_entries
from hybridlm.model.mixers.common.entry_attention import entry_attention, entry_weights, window_attention
from hybridlm.model.mixers.common.gated_sum import gated_sum
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.overlap import reduce_to_blocks
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes, size_of
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import attention, selected_attention

BRANCHES = 3


@dataclass(kw_only=True)
class NSAConfig(GroupedHeadsConfig):
    """Configuration of native sparse attention.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.
        rope: rotary embedding; entries are rotated to the position of their first token.
        compression: how entries are made of windows: `mean`, `weighted` by learned places, or `linear`.
        length: tokens of a window, a multiple of `stride`.
        stride: tokens from one window to the next, a divisor of `block`.
        block: tokens per block.
        topk: blocks that a token reads, `first` and `local` included.
        first: first blocks of the document that are always read.
        local: newest blocks that are always read, the token's own included.
        near: tokens of the window, the token's own included.
        branch_keys: each branch has keys and values of its own; otherwise all have the same.
    """

    kind: str = "nsa"
    rope: RopeConfig = field(default_factory=RopeConfig)
    compression: Compression = "linear"
    length: int = 32
    stride: int = 16
    block: int = 64
    topk: int = 16
    first: int = 1
    local: int = 2
    near: int = 512
    branch_keys: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rope.check(self.head_dim)
        for key in ("length", "stride", "block", "topk", "local", "near"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.first >= 0, "first", "must not be negative", got=self.first)
        require(self.length % self.stride == 0, "length", "must be a multiple of stride", got=self.length,
                expected=f"a multiple of {self.stride}")
        require(self.block % self.stride == 0, "stride", "must divide the block", got=self.stride,
                expected=f"a divisor of {self.block}")
        require(self.first + self.local <= self.topk, "topk", "must hold the blocks that are always read",
                got=self.topk, expected=f"at least {self.first + self.local}")

    @property
    def key_sets(self) -> int:
        """Sets of keys and values C."""
        return BRANCHES if self.branch_keys else 1

    def num_params(self, context: LayerContext) -> int:
        D, H, G, K = context.hidden_size, self.num_heads, self.kv_heads, self.head_dim
        gates = (D + 1) * BRANCHES * H
        projections = 2 * D * (H + self.key_sets * G) * K
        return projections + gates + count_compression_params(self.compression, self.length, G, K)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D, H, G, K = context.hidden_size, self.num_heads, self.kv_heads, self.head_dim
        entries = count_seen_entries(context_length, self.length, self.stride)
        read = min(count_visible_keys(context_length), count_block_keys(context_length, self.block, self.topk, True))
        near = count_visible_keys(context_length, min(self.near, context_length))
        return {"projections": 2.0 * D * (2 * (H + self.key_sets * G) * K + BRANCHES * H),
                "compression": count_compression_flops(self.compression, self.length, self.stride, G, K)
                * count_entries(context_length, self.length, self.stride)[0] * self.stride / max(1, context_length),
                "attention": 4.0 * H * K * (entries + read + near), "selector": 2.0 * H * K * entries}

    def forward_only_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        return self.flops_per_token(context, context_length)["selector"]

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        kept = context_length + sum(count_entries(context_length, self.length, self.stride))
        kept += self.branch_keys * min(context_length, self.near - 1)
        return 2 * self.kv_heads * self.head_dim * kept * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        entries = 2 * keys * (self.length + 2) / self.stride
        return element_bytes * (7 * queries + (4 + 4 * self.key_sets) * keys + entries + 3 * BRANCHES * self.num_heads)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tensors = 2 * BRANCHES if self.branch_keys else 3  # shared keys before their rotation and behind it, and values
        size = tensors * rows * length * element_bytes * self.kv_heads * self.head_dim
        return [ShardTraffic("gather", size, size)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        return super().canonical(norm) | {"rope": self.rope.canonical(uses_mscale=False)}

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads as in the model; of a context shorter than 32K tokens, the published sizes in proportion."""
        filled = super().fill_sizes(options, model)
        block = max(4, min(64, model.max_position // 64))
        filled.setdefault("block", block)
        block = size_of(filled, "block", block)
        filled.setdefault("stride", max(1, block // 4))
        filled.setdefault("length", 2 * size_of(filled, "stride", 1))
        always = size_of(filled, "first", 1, least=0) + size_of(filled, "local", 2, least=0)
        filled.setdefault("topk", max(always + 1, min(1024, model.max_position // 16) // block))
        filled.setdefault("near", max(8, min(512, model.max_position // 16)))
        return filled

    def rotates(self) -> bool:
        return self.rope.kind != "none"


@dataclass
class NSAState:
    """Decode state: rotated keys and values of all tokens, [B, S, 2, G, K], entries, and a window's own keys."""

    tokens: TokenCache
    entries: EntryCache
    near: TokenCache | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return self.tokens.num_bytes + self.entries.num_bytes + (0 if self.near is None else self.near.num_bytes)


@register_mixer("nsa", NSAConfig)
class NSA(SequenceMixer):
    """The module: q_proj, k_proj, v_proj [C G K, D], o_proj, gate_proj with a bias, and the compressor.

    Sets of keys and values stand in the order of entries, blocks and window.
    """

    config: NSAConfig

    def __init__(self, config: NSAConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, config.key_sets * G * K, bias=False)
        self.v_proj = nn.Linear(D, config.key_sets * G * K, bias=False)
        self.gate_proj = nn.Linear(D, BRANCHES * H)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.compressor = Compressor(config.compression, config.length, G, K)
        self.rotary_dim = config.rope.rotary_dim(K)
        self.lists = self.scores_per_entry = G  # `entry_weights` holds those of a piece of its own
        self.budget = BlockBudget(config.topk, config.first, config.local)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: NSAState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTHK, k_BTXK, v_BTXK = (proj(x_BTD).unflatten(-1, (-1, config.head_dim))
                                  for proj in (self.q_proj, self.k_proj, self.v_proj))
        q_BTHK = rotate(q_BTHK, config.rope, self.rotary_dim, seq)
        sets = list(zip(k_BTXK.chunk(config.key_sets, 2), v_BTXK.chunk(config.key_sets, 2), strict=True))
        raw = sets[0]
        rotated = [(rotate(k, config.rope, self.rotary_dim, seq), v) for k, v in sets[-2:]]
        if state is None:
            if seq.shard is not None:  # one exchange for both
                raw_BS2GK = seq.history(torch.stack(raw, 2))
                raw = (raw_BS2GK[:, :, 0], raw_BS2GK[:, :, 1])
            kept = [(seq.history(k), seq.history(v)) for k, v in rotated] if config.branch_keys else [
                (seq.history(rotated[0][0]), raw[1])]
        else:
            caches = [state.tokens] if state.near is None else [state.tokens, state.near]
            read = [cache.append(torch.stack(pair, 2)) for cache, pair in zip(caches, rotated, strict=True)]
            kept = [(x_BS2GK[:, :, 0], x_BS2GK[:, :, 1]) for x_BS2GK in read]
        k_BSGK, v_BSGK = kept[0]
        near_k_BSGK, near_v_BSGK = kept[-1]
        index, v_BEGK = self._entries(raw, q_BTHK, k_BSGK.shape[1], seq, state)
        chosen = choose_blocks(self, index, self.budget)
        scale = config.head_dim**-0.5
        far, _ = entry_attention(q_BTHK, index.entries_BE, v_BEGK, index.windows, scale)
        picked, _ = selected_attention(q_BTHK, k_BSGK, v_BSGK, chosen, block=config.block,
                                       cu_seqlens=seq.history_borders)
        near = self._near(q_BTHK, near_k_BSGK, near_v_BSGK, seq)
        gates_BTH3 = self.gate_proj(x_BTD).sigmoid().unflatten(-1, (-1, BRANCHES))
        return self.o_proj(gated_sum(gates_BTH3, (far, picked, near)).flatten(-2)), {}

    def _near(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, seq: SequenceInfo) -> Tensor:
        """Attention to the window. `attention` takes no packed keys beyond the queries, which a shard has."""
        if seq.shard is None:
            return attention(q_BTHK, k_BSGK, v_BSGK, window=self.config.near, cu_seqlens=seq.cu_seqlens)
        return window_attention(q_BTHK, k_BSGK, v_BSGK, self.config.near, seq)[0]

    def _entries(self, raw: tuple[Tensor, Tensor], q_BTHK: Tensor, keys: int, seq: SequenceInfo,
                 state: NSAState | None) -> tuple[BlockIndex, Tensor]:
        """Keys of the entries with the queries that score them, and values [B, E, G, K]."""
        config = self.config
        windows = EntryWindows.of(seq, q_BTHK, keys, config.length, config.stride)
        if state is None:
            k_BEGK, v_BEGK = self.compressor(raw, windows)
            k_BEGK = self._rotate_entries(k_BEGK, windows.place_BE)
        else:
            k_BEGK, v_BEGK = windows.pad(state.entries.append(torch.stack(raw, 2), self._combine)).unbind(2)
        blocks = EntryWindows.of(seq, q_BTHK, keys, config.block, config.block)
        return BlockIndex(q_BTHK, k_BEGK, windows, blocks), v_BEGK

    def _combine(self, raw_BEL2GK: Tensor, place_BE: Tensor) -> Tensor:
        """Entries [B, E, 2, G, K], their keys rotated to the position of the first token."""
        k_BEGK, v_BEGK = self.compressor(raw_BEL2GK).unbind(2)
        return torch.stack([self._rotate_entries(k_BEGK, place_BE), v_BEGK], 2)

    def _rotate_entries(self, k_BEGK: Tensor, place_BE: Tensor) -> Tensor:
        """Keys of entries, rotated to the position of the first token."""
        return rotate(k_BEGK, self.config.rope, self.rotary_dim, SequenceInfo(place_BE))

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        """Scores of blocks [B, Q, G, P] for `choose_blocks`."""
        p_BQGE = entry_weights(index.queries_BT, index.entries_BE, index.windows, rows, self.config.head_dim**-0.5)
        return reduce_to_blocks(p_BQGE, index.windows, index.blocks, rows, "sum")

    def head_rows(self) -> dict[str, int]:
        keys = self.config.key_sets * self.config.kv_heads
        return {"q_proj": self.config.num_heads, "k_proj": keys, "v_proj": keys}

    def new_state(self, batch: int, max_length: int) -> NSAState:
        config = self.config
        return NSAState(TokenCache(max_length), EntryCache(max_length, config.length, config.stride),
                        TokenCache(max_length, config.near) if config.branch_keys else None)

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
        self.compressor.init_weights(std)
