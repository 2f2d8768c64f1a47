"""Softmax attention to a window of tokens and to compressed entries of all earlier ones, in one softmax with sinks.

    c_t = norm(W_qa x_t),   q_t = rope(norm(W_qb c_t)) per head,   k_s = v_s = rope(norm(W_kv x_s)), one for all heads
    o_t = rope^-1( sum over s in the window of t, and over entries e that t reads, of softmax(q_t . k / sqrt(K)) k )
    y_t = W_b [A_1 o_t,1 | ... | A_P o_t,P]                      the heads in P groups

An entry stands for `ratio` tokens, with overlap for 2 `ratio`, and is seen by the token that completes it and by later
ones. With an indexer a token reads the entries that it selects (CSA), else all (HCA); without a ratio there are none.
Tokens of the window are inside entries too, as published. A layer may read the entries of an earlier one, and the list
of its indexer too (CSA2).

Sources: DeepSeek-V4, 2026 (arXiv 2606.19348), section 2.3, and its class in transformers; DeepSeek-V4.1-Flash, 2026
(arXiv 2609.19969, from summaries), for layers that share.
B rows, T tokens, S keys, D hidden size, H query heads, K head dim, Q dims of the queries' latent, P groups of heads,
E entries, N selected entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import EntryCache, TokenCache
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.cost import count_visible_keys, count_visible_pools
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.entry_attention import entry_attention, join_attention, window_attention
from hybridlm.model.mixers.common.entry_indexer_config import EntryIndexerConfig
from hybridlm.model.mixers.common.entry_selection import EntrySelectingMixer
from hybridlm.model.mixers.common.entry_sharing import INDEX_KEYS, EntrySharingConfig
from hybridlm.model.mixers.common.gated_entries import GatedEntries
from hybridlm.model.mixers.common.grouped_output import GroupedOutput
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.selector_loss import EntryTargets, observe_selector
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes, size_of
from hybridlm.model.norm import RMSNorm, WeightlessRMSNorm
from hybridlm.model.rope import RopeConfig, rotate_last
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import selected_attention
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class CompressedAttentionConfig(EntrySharingConfig):
    """Configuration of attention to a window and to compressed entries.

    Args:
        num_heads: query heads H; all read the same keys.
        head_dim: dims per head K, of queries, of keys, which are values too, and of entries.
        rope_head_dim: last dims of each head that rotate.
        q_lora_rank: dims of the latent that queries are made from Q.
        output_groups: groups of heads P that are projected apart.
        output_rank: dims of each group after its projection.
        rope: rotary embedding of queries, keys and entries; values are rotated too, and outputs back.
        window: tokens of the window, the token's own included.
        ratio: tokens that one entry stands for; null has no entries (DeepSeek-V4's first layers).
        overlap: an entry also pools the `ratio` tokens before its own.
        position_bias: the softmax that pools an entry has a learned term per slot and channel.
        q_head_norm: queries are normed per head, without weights.
        sinks: one learned logit per head that takes part in the softmax and carries no value.
        share_entries: reads the entries of an earlier layer and makes none; `overlap` and `position_bias` have no
            effect then. Head dims and rotation must be those of that layer, and `ratio` where an indexer of this layer
            selects.
        source: layer whose entries are read: its index, or the name of a mixer, whose nearest earlier layer is read;
            null is the nearest earlier layer that makes entries.
        indexer: selects the entries that a token reads; null reads all. Where entries are shared it scores the index
            keys of their layer by queries of its own; with `share: true` it reads the selection of an earlier layer.
    """

    kind: str = "compressed_attention"
    num_heads: int
    head_dim: int
    rope_head_dim: int
    q_lora_rank: int
    output_groups: int
    output_rank: int
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(kind="interleaved"))
    window: int = 128
    ratio: int | None = 4
    overlap: bool = True
    position_bias: bool = True
    q_head_norm: bool = True
    sinks: bool = True
    share_entries: bool = False
    source: int | str | None = None
    indexer: EntryIndexerConfig | None = None
    loss_names: ClassVar[tuple[str, ...]] = ("indexer_kl",)

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "q_lora_rank", "output_groups", "output_rank", "window"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.ratio is None or self.ratio > 0, "ratio", "must be positive", got=self.ratio,
                hint="null has no entries")
        require(self.num_heads % self.output_groups == 0, "output_groups", "must divide num_heads",
                got=self.output_groups, expected=f"a divisor of {self.num_heads}")
        require(self.rope.partial_rotary_factor == 1, "rope.partial_rotary_factor", f"is not used by {self.kind}",
                got=self.rope.partial_rotary_factor, expected="1", hint="rope_head_dim says how many dims rotate")
        scaling = self.rope.scaling
        require(scaling is None or scaling.table_scale() == 1, "rope.scaling.attention_factor",
                "would scale values, which rotate as keys do", got=scaling and scaling.table_scale(), expected="1.0")
        self.check_sharing()
        own = self.indexer if self.has_own_indexer else None
        narrowest = self.head_dim if own is None else min(self.head_dim, own.head_dim)
        require(self.rope.kind == "none" or (0 < self.rope_head_dim <= narrowest and self.rope_head_dim % 2 == 0),
                "rope_head_dim", "must be even and fit into the heads, those of the indexer too",
                got=self.rope_head_dim, expected=f"an even number up to {narrowest}",
                hint="rope.kind=none rotates nothing")
        require(self.indexer is None or self.has_entries, "indexer", "needs entries to select from",
                got="ratio=null", expected="a ratio, or no indexer")

    def _weights(self, context: LayerContext) -> int:
        """Number of weights of the projections, those of the indexer left out."""
        D, H, K, Q = context.hidden_size, self.num_heads, self.head_dim, self.q_lora_rank
        queries_and_keys = Q * (D + H * K) + D * K
        output = self.output_rank * (H * K + self.output_groups * D)
        form = self.entry_form
        return queries_and_keys + output + (0 if form is None else form.projection_weights(D))

    def num_params(self, context: LayerContext) -> int:
        D, K, Q, form = context.hidden_size, self.head_dim, self.q_lora_rank, self.entry_form
        count = self._weights(context) + Q + K + self.sinks * self.num_heads
        if form is not None:
            count += form.num_params(D) - form.projection_weights(D)
        return count if self.indexer is None else count + self.indexer.num_params(D, Q, form)

    @property
    def seen_window(self) -> int | None:
        """Last tokens that a token sees, through entries too; None: all."""
        return None if self.has_entries else self.window

    def _read_keys(self, context: LayerContext, context_length: int) -> float:
        """Mean number of keys of the window and of entries that a token reads."""
        near = count_visible_keys(context_length, min(self.window, context_length))
        ratio, indexer = self.entry_ratio(context), self.reading_indexer(context)
        if ratio is None or indexer is None or not self.selects(context, context_length):
            return near + self.seen_entries(context, context_length)
        return near + count_visible_pools(context_length, ratio, indexer.topk)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        parts = {"projections": 2.0 * self._weights(context),
                 "attention": 4.0 * self.num_heads * self.head_dim * self._read_keys(context, context_length)}
        indexer, ratio = self.indexer, self.entry_ratio(context)
        if indexer is None or indexer.share or ratio is None:
            return parts
        scored = self.selects(context, context_length)
        weights = self.index_weights(context) if scored else 0
        if indexer.key_input == "entries" and not scored:  # entries keep their index keys in any case
            weights = indexer.key_weights(context.hidden_size, self.entry_form)
        if weights:
            scores = indexer.score_flops(context_length, ratio) if scored else 0.0
            parts["indexer"] = 2.0 * weights + scores
        return parts

    def forward_only_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        return self.flops_per_token(context, context_length).get("indexer", 0.0)

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        """Scores of attention for the targets; scores of the indexer forward, again and backward; its projections."""
        ratio, indexer = self.entry_ratio(context), self.reading_indexer(context)
        if ratio is None or indexer is None or indexer.loss_weight == 0:
            return 0.0
        targets = 2.0 * self.num_heads * self.head_dim * self.seen_entries(context, context_length)
        weights = 0 if indexer.share else self.index_weights(context)
        projections = (2.0 if self.selects(context, context_length) else 4.0) * weights
        return targets + 4.0 * indexer.score_flops(context_length, ratio) + projections

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Those of the window alone where entries are shared: the layer that makes them keeps them."""
        numbers, form = min(context_length, self.window - 1) * self.head_dim, self.entry_form
        if form is not None:
            numbers += form.state_numbers(context_length)
            if self.indexer is not None:
                numbers += self.indexer.state_numbers(context_length, form, context.is_read(INDEX_KEYS))
        return numbers * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys, form = self.num_heads * self.head_dim, self.head_dim, self.entry_form
        entries = 0 if form is None else 4 * form.projections * form.series * keys
        kept = 2 * self.q_lora_rank + 7 * queries + 3 * keys + entries + self.output_groups * self.output_rank
        indexer = self.indexer
        indices = 0 if indexer is None or indexer.share or indexer.mode == "dense" else 8 * indexer.topk
        return element_bytes * kept + indices

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Every division is possible: windows and entries are made of gathered tokens."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        per_number, form, indexer = rows * length * element_bytes, self.entry_form, self.indexer
        numbers, index, learned = self.head_dim, 0, 0
        if form is not None:
            series = form.projections * form.series
            numbers *= 1 + series
            if indexer is not None and indexer.key_input == "tokens":
                learns = indexer.loss_weight > 0
                index = series * indexer.head_dim * (learns or self.selects(context, length * shards))
                learned = index * learns
        return [ShardTraffic("gather", per_number * (numbers + index), per_number * (numbers + learned))]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data, form = super().canonical(norm), self.entry_form
        data["rope"] = self.rope.canonical(uses_mscale=False)
        data["rope_head_dim"] = 0 if self.rope.kind == "none" else self.rope_head_dim
        data["ratio"] = None if form is None else form.ratio
        data["overlap"] = form is not None and form.overlap
        data["position_bias"] = form is not None and form.biased
        data["indexer"] = None if self.indexer is None else self.indexer.canonical(self.share_entries)
        return data

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads as in the model; latents of a quarter of its width, an eighth of a head rotated, groups of 8 heads."""
        heads = model.heads_for(cls)
        count = size_of(options, "num_heads", heads.num_heads)
        return {"num_heads": count, "head_dim": heads.head_dim, "rope_head_dim": max(2, heads.head_dim // 16 * 2),
                "q_lora_rank": max(8, model.hidden_size // 4), "output_groups": gcd(count, max(1, count // 8)),
                "output_rank": max(8, model.hidden_size // 4)}

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Sizes follow the model; an indexer reads an eighth of the entries of the longest context, at most 512.

        Entries without overlap stand for a 32nd of that context, at most 128 tokens, as those of DeepSeek-V4 do.

        >>> options = {"kind": "compressed_attention", "overlap": False}
        >>> CompressedAttentionConfig.fill_sizes(options, ModelSizes(64, max_position=1024))["ratio"]
        32
        """
        filled = super().fill_sizes(options, model)
        if filled.get("overlap", True) is False and filled.get("share_entries") is not True:
            filled.setdefault("ratio", max(2, min(128, model.max_position // 32)))
        indexer = filled.get("indexer")
        if isinstance(indexer, Mapping) and indexer.get("share") is not True:
            heads = model.heads_for(cls)
            head_dim = min(128, size_of(filled, "head_dim", heads.head_dim))
            sizes = {"num_heads": size_of(filled, "num_heads", heads.num_heads),
                     "head_dim": max(head_dim, size_of(filled, "rope_head_dim", head_dim))}
            entries = model.max_position // size_of(filled, "ratio", 4)
            filled["indexer"] = EntryIndexerConfig.fill_sizes(indexer, sizes, entries)
        return filled

    def rotates(self) -> bool:
        return self.rope.kind != "none"


@dataclass
class CompressedAttentionState:
    """Decode state: keys of the window [B, W, 1, K], entries [B, E, K], and those of the indexer; None without them."""

    window: TokenCache
    entries: EntryCache | None
    index_entries: EntryCache | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.num_bytes for part in (self.window, self.entries, self.index_entries) if part is not None)


@register_mixer("compressed_attention", CompressedAttentionConfig)
class CompressedAttention(EntrySelectingMixer):
    """The module: q_a_proj, q_a_norm, q_b_proj, kv_proj, kv_norm, output; by option sinks [H], entries and indexer."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("q_a_norm.weight", "kv_norm.weight", "k_norm.weight", "sinks",
                                                "norm.weight", "position_bias", "weights_proj.weight")

    config: CompressedAttentionConfig

    def __init__(self, config: CompressedAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        D, H, K, Q = context.hidden_size, config.num_heads, config.head_dim, config.q_lora_rank
        self.q_a_proj = nn.Linear(D, Q, bias=False)
        self.q_a_norm = RMSNorm.of(context.norm, Q)
        self.q_b_proj = nn.Linear(Q, H * K, bias=False)
        self.q_b_norm = WeightlessRMSNorm(context.norm.eps) if config.q_head_norm else None
        self.kv_proj = nn.Linear(D, K, bias=False)
        self.kv_norm = RMSNorm.of(context.norm, K)
        self.output = GroupedOutput(H * K, config.output_groups, config.output_rank, D)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None
        self.build_entries(context, Q)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo,
                state: CompressedAttentionState | None = None) -> tuple[Tensor, Aux]:
        latent_BTQ = self.q_a_norm(self.q_a_proj(x_BTD))
        q_BTHK = self.q_b_proj(latent_BTQ).unflatten(-1, (-1, self.config.head_dim))
        if self.q_b_norm is not None:
            q_BTHK = self.q_b_norm(q_BTHK)
        k_BT1K = self.kv_norm(self.kv_proj(x_BTD))[:, :, None]
        q_BTHK, k_BT1K = (rotate_last(x, self.config.rope, self.rotary_dim, seq) for x in (q_BTHK, k_BT1K))
        k_BS1K = seq.history(k_BT1K) if state is None else state.window.append(k_BT1K)
        o_BTHK, lse_BTH = window_attention(q_BTHK, k_BS1K, k_BS1K, self.config.window, seq, self.sinks)
        aux: Aux = {}
        if self.config.has_entries:
            entries, index_keys = (None, None) if state is None else (state.entries, state.index_entries)
            made, keys_BEI = self.made_entries(x_BTD, seq, entries)
            selection = self.select(x_BTD, latent_BTQ, made, keys_BEI, seq, index_keys, decodes=state is not None)
            e_BE1K, windows = made.entries_BEK[:, :, None].to(q_BTHK.dtype), made.windows
            chosen = selection.chosen_BT1N
            sparse = chosen is not None and self.attention_mode == "sparse"
            far_BTHK, far_lse_BTH = self._attend(q_BTHK, e_BE1K, windows, chosen if sparse else None)
            if selection.indexer is not None and selection.index is not None and state is None:
                targets = EntryTargets(wide(q_BTHK.detach()), wide(e_BE1K.detach()), lse_BTH.detach(), sparse)
                aux = observe_selector("indexer", selection.indexer, selection.index, targets, selection.indexer.budget,
                                       chosen, seq, only_chosen=sparse)
            o_BTHK = join_attention(o_BTHK, lse_BTH, far_BTHK, far_lse_BTH)
        o_BTHK = rotate_last(o_BTHK, self.config.rope, self.rotary_dim, seq, back=True)
        return self.output(o_BTHK), aux

    def _attend(self, q_BTHK: Tensor, e_BE1K: Tensor, windows: EntryWindows,
                chosen_BT1N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention to all entries or the chosen ones, and the logarithm of its sum of exponentials."""
        if chosen_BT1N is None:
            return entry_attention(q_BTHK, e_BE1K, e_BE1K, windows, self.config.head_dim**-0.5)
        place_BT1N = torch.where(chosen_BT1N < 0, -1, chosen_BT1N + windows.first_BT[..., None, None])
        return selected_attention(q_BTHK, e_BE1K, e_BE1K, place_BT1N)

    def head_rows(self) -> dict[str, int]:
        return {"q_b_proj": self.config.num_heads}

    def new_state(self, batch: int, max_length: int) -> CompressedAttentionState:
        keys = None if self.indexer is None else self.indexer.entries
        if self.attention_mode == "dense" and not self.keys_are_read:
            keys = None
        return CompressedAttentionState(TokenCache(max_length, self.config.window),
                                        None if self.entries is None else self.entries.new_cache(max_length),
                                        None if keys is None else keys.new_cache(max_length))

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
        self.output.init_weights(std)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        for module in self.modules():
            if isinstance(module, GatedEntries):
                module.init_weights()
