"""Softmax attention to the keys and values of an earlier layer: it has queries and an output of its own.

    q_t = rope(norm(W_q x_t)),   o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s,   y_t = W_o o_t

k and v are those of an earlier attention layer as it reads them itself: normalised and rotated. By option s runs over
the blocks that this layer's attention chooses, and a window with keys and values of its own is added.

Sources: Sun et al. 2024 (YOCO), section 2.3; Brandon et al. 2024 (CLA); Gemma 3n and Character.AI for windows; HySparse
(arXiv 2602.03560) and HySparse2 (arXiv 2609.26368) for blocks.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import AttentionState, NoState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.chosen_blocks import CHOSEN_BLOCKS, ChosenBlocksConfig
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, check_heads
from hybridlm.model.mixers.common.indexed_attention import IndexedMixer, IndexedMixerConfig
from hybridlm.model.mixers.common.indexer import IndexerConfig
from hybridlm.model.mixers.common.key_sharing import KEYS_VALUES, HeadNorm, KeyLayout, rotated_heads
from hybridlm.model.mixers.common.near_branch import NearBranch, near_branch_params
from hybridlm.model.mixers.common.output_gate import OutputGate, apply_output_gate, build_output_gate, gate_width
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedRead


@dataclass(kw_only=True)
class SharedAttentionConfig(IndexedMixerConfig):
    """Configuration of attention to the keys and values of an earlier layer.

    Args:
        source: layer that is read: its index, or the name of a mixer, whose nearest earlier layer is read; null is the
            nearest earlier layer with attention of its own.
        num_heads: query heads H, a multiple of the key/value heads that are read; null takes those of that layer.
        q_norm: `head` normalises queries per head, `full` over all heads together.
        q_norm_eps: null takes the model's.
        q_bias: bias of q_proj.
        o_bias: bias of o_proj.
        output_gate: a sigmoid gate per element or per head of the output.
        sinks: one learned logit per head that takes part in the softmax and carries no value.
        window: keys that a token sees, at most those of the layer that is read; null takes that layer's.
        blocks: reads only the blocks that the attention of the source chooses, its option `choose_blocks`.
        near: adds attention to so many of the last tokens, the token's own included, with keys and values of this
            layer's own, and a gate and sinks as those of the first part; null has none.
        indexer: reads only the keys that it selects; with `share: true` those that an earlier layer's indexer selects.
            It has no rotation of its own unless `rope_dim` says how many of its dims rotate.
    """

    kind: str = "shared_attention"
    source: int | str | None = None
    num_heads: int | None = None
    q_norm: HeadNorm = "none"
    q_norm_eps: float | None = None
    q_bias: bool = False
    o_bias: bool = False
    output_gate: OutputGate = "none"
    sinks: bool = False
    window: int | None = None
    blocks: bool = False
    near: int | None = None
    indexer: IndexerConfig | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "q_norm_eps", "window", "near"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(not self.blocks or self.window is None, "window", "cannot stand beside blocks", got=self.window,
                expected="null", hint="`near` adds a window with keys of its own")
        require(self.near is None or self.output_gate != "none", "output_gate", "must join the two parts where `near` "
                "adds a window", got=self.output_gate, expected="element or head")
        if self.indexer is not None:
            for key in ("window", "near"):
                require(getattr(self, key) is None, key, "cannot stand beside an indexer", got=getattr(self, key),
                        expected="null")
            for key in ("sinks", "blocks"):
                require(not getattr(self, key), key, "cannot stand beside an indexer", got=True, expected="false")
            self.indexer.check_rope(self.index_rope_dim)

    @property
    def index_rope_dim(self) -> int:
        return 0

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        if not self.blocks:
            return SharedRead(KEYS_VALUES, self.source, "source"), *super().reads(context)
        chosen = SharedRead(CHOSEN_BLOCKS, self.source, "blocks")
        return SharedRead(KEYS_VALUES, context.source_of(chosen), "source"), chosen

    def keys(self, context: LayerContext) -> KeyLayout:
        """Heads, rotation and window of the keys that are read.

        Raises:
            ConfigError: no earlier layer leaves keys.
        """
        layout: KeyLayout = context.shared_layout(self.reads(context)[0])
        return layout if self.window is None else replace(layout, window=self.window)

    def check_sources(self, context: LayerContext) -> None:
        super().check_sources(context)
        layout: KeyLayout = context.shared_layout(self.reads(context)[0])
        require((self.num_heads or layout.num_heads) % layout.num_kv_heads == 0, "num_heads",
                "must be a multiple of the key/value heads that are read", got=self.num_heads,
                expected=f"a multiple of {layout.num_kv_heads}")
        require(self.indexer is None or layout.window is None, "indexer", "needs a source that sees all keys",
                got=f"a window of {layout.window}", expected="a source without a window")
        require(self.window is None or layout.window is None or self.window <= layout.window, "window",
                "must not be wider than that of the layer that is read", got=self.window,
                expected=f"at most {layout.window}")

    def chooser(self, context: LayerContext) -> ChosenBlocksConfig | None:
        """The choice of blocks by the source; None where all of its keys are read."""
        if not self.blocks:
            return None
        chooser: ChosenBlocksConfig = context.shared_layout(self.reads(context)[1])
        return chooser

    def heads(self, context: LayerContext) -> int:
        """Query heads H."""
        return self.num_heads or self.keys(context).num_heads

    def _width(self, context: LayerContext) -> int:
        return self.heads(context) * self.keys(context).head_dim

    def _gate_width(self, context: LayerContext) -> int:
        return gate_width(self.output_gate, self.heads(context), self.keys(context).head_dim)

    def num_params(self, context: LayerContext) -> int:
        width, hidden, head_dim = self._width(context), context.hidden_size, self.keys(context).head_dim
        norm = {"none": 0, "head": head_dim, "full": width}[self.q_norm]
        gate = self._gate_width(context)
        biases = (width + gate) * self.q_bias + hidden * self.o_bias
        near = sum(self._near_params(context))
        index = 0 if self.indexer is None else self.indexer.num_params(context, hidden)
        return (2 * width + gate) * hidden + biases + norm + self.heads(context) * self.sinks + near + index

    def _near_params(self, context: LayerContext) -> tuple[int, int]:
        """Weights of the projections of the window's own keys, values and gate, and its other parameters."""
        if self.near is None:
            return 0, 0
        return near_branch_params(self.keys(context), context.hidden_size, self.heads(context), gate=self.output_gate,
                                  k_norm=self.q_norm, sinks=self.sinks)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        width = self._width(context)
        chooser = self.chooser(context) or self.reading_indexer(context)
        if chooser is None:
            keys = count_visible_keys(context_length, self.keys(context).window)
        else:
            keys = chooser.read_keys(context_length)
        if self.near is not None:
            keys += count_visible_keys(context_length, self.near)
        projections = 2.0 * context.hidden_size * (2 * width + self._gate_width(context))
        projections += 2.0 * self._near_params(context)[0]
        parts = {"projections": projections, "attention": 4.0 * width * keys}
        indexer = self.reading_indexer(context)
        if indexer is not None:
            parts["indexer"] = indexer.flops_per_token(context, context.hidden_size, context_length)
        return parts

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        indexer = self.reading_indexer(context)
        return 0.0 if indexer is None else indexer.kl_flops_per_token(context, context.hidden_size, context_length,
                                                                      self._width(context))

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Those of the window and of an indexer alone: the layer that leaves the keys keeps them."""
        if self.near is None:
            return 0 if self.indexer is None else self.indexer.state_bytes(context_length, element_bytes)
        layout = self.keys(context)
        return min(context_length, self.near - 1) * 2 * layout.num_kv_heads * layout.head_dim * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: queries, also before a norm, and the output of attention."""
        gate = 2 if self.output_gate == "element" else 0
        numbers = (2 + gate + (self.q_norm != "none")) * self._width(context)
        if self.near is not None:
            layout = self.keys(context)
            numbers += (1 + gate) * self._width(context)
            numbers += (2 + (self.q_norm != "none")) * layout.num_kv_heads * layout.head_dim
        chooser, lists = self.chooser(context), 0.0
        if chooser is not None and context.is_first_reader(self.reads(context)[1]):  # all readers keep the same lists
            lists = chooser.list_bytes(self.keys(context).num_kv_heads)
        return element_bytes * numbers + lists

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Query heads are divided; where their number follows the source, the source refuses what does not divide."""
        if self.num_heads is not None:
            check_heads(self.num_heads, shards)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        layout = self.keys(context)
        tokens = rows * length * element_bytes
        size = tokens * attention_exchange_size(self.heads(context), layout.num_kv_heads, layout.head_dim, shards)
        near = [] if self.near is None else [ShardTraffic("exchange", size, size)]
        indexer, keys = self.reading_indexer(context), layout.num_kv_heads * layout.head_dim
        if indexer is not None:
            return indexer.shard_traffic(tokens, length * shards, size, keys, 2 * keys)
        chooser = self.chooser(context)
        if chooser is None or not chooser.selects(length * shards):
            return [ShardTraffic("exchange", size, size), *near]
        gathered = 2 * tokens * layout.num_kv_heads * layout.head_dim
        return [ShardTraffic("gather", gathered, gathered), *near]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = MixerConfig.canonical(self, norm)
        data["indexer"] = None if self.indexer is None else self.indexer.canonical(self.index_rope_dim)
        data["q_norm_eps"] = None if self.q_norm == "none" else self.q_norm_eps or norm.eps
        return data

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        return {}  # heads are those of the layer that is read

    @classmethod
    def indexer_options(cls, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return None  # its indexer selects among the keys of another layer

    def can_take_indexer(self) -> bool:
        return False

    def rotates(self) -> bool:
        return False  # the layer that is read decides


@register_mixer("shared_attention", SharedAttentionConfig)
class SharedAttention(IndexedMixer):
    """Parameters: q_proj [H K, D], o_proj [D, H K]; by option q_norm, g_proj, sinks [H], near_branch and indexer."""

    fp32_parameters: ClassVar[tuple[str, ...]] = (*IndexedMixer.fp32_parameters, "q_norm.weight", "sinks")
    config: SharedAttentionConfig

    def __init__(self, config: SharedAttentionConfig, context: LayerContext):
        super().__init__(config.indexer, context)
        self.config = config
        config.check_sources(context)
        self.source = context.source_of(config.reads(context)[0])
        self.layout = config.keys(context)
        self.num_heads, head_dim = config.heads(context), self.layout.head_dim
        width = self.num_heads * head_dim
        self.q_proj = nn.Linear(context.hidden_size, width, bias=config.q_bias)
        self.g_proj = build_output_gate(config.output_gate, context.hidden_size, self.num_heads, head_dim,
                                        bias=config.q_bias)
        self.o_proj = nn.Linear(width, context.hidden_size, bias=config.o_bias)
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if config.sinks else None
        self.q_norm = None
        if config.q_norm != "none":
            self.q_norm = RMSNorm.of(context.norm, head_dim if config.q_norm == "head" else width, config.q_norm_eps)
        self.chooser = config.chooser(context)
        self.near_branch = None
        if config.near is not None:
            self.near_branch = NearBranch(config.near, self.layout, context.hidden_size, self.num_heads,
                                          gate=config.output_gate, k_norm=config.q_norm, norm=context.norm,
                                          norm_eps=config.q_norm_eps, sinks=config.sinks)
        self.build_indexer(context, context.hidden_size, self.layout.rope, config.index_rope_dim)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo,
                state: NoState | AttentionState | None = None) -> tuple[Tensor, Aux]:
        k_BSGK, v_BSGK = seq.read(KEYS_VALUES, self.source)
        layout = self.layout
        q_BTHK = rotated_heads(self.q_proj(x_BTD), self.q_norm, self.config.q_norm, layout.head_dim, layout.rope, seq)
        k_BSGK, v_BSGK = k_BSGK.to(q_BTHK.dtype), v_BSGK.to(q_BTHK.dtype)
        chosen_BTGN = None if self.chooser is None else seq.read(CHOSEN_BLOCKS, self.source)
        aux: Aux = {}
        if chosen_BTGN is None:
            cache = state.index_keys if isinstance(state, AttentionState) else None
            selection = self.select(x_BTD, x_BTD, seq, cache)
            if selection.indices is not None:
                k_BSGK, v_BSGK = seq.history(k_BSGK), seq.history(v_BSGK)
            o_BTHK, aux = self.attend(q_BTHK, k_BSGK, v_BSGK, seq, selection, window=layout.window, sinks_H=self.sinks)
        else:
            assert self.chooser is not None
            o_BTHK = self.chooser.attend(q_BTHK, k_BSGK, v_BSGK, chosen_BTGN, seq, self.sinks)
        o_BTX = apply_output_gate(o_BTHK, x_BTD, self.g_proj, self.config.output_gate)
        if self.near_branch is not None:
            o_BTX = o_BTX + self.near_branch(x_BTD, q_BTHK, seq, state)
        return self.o_proj(o_BTX), aux

    @property
    def decodes_padded_rows(self) -> bool:
        config = self.config  # padded rows read all keys that are kept
        return self.sinks is None and config.window is None and not config.blocks and config.near is None and (
            config.indexer is None)

    def head_rows(self) -> dict[str, int]:
        gate = {"g_proj": self.num_heads} if self.config.output_gate == "element" else {}
        return {"q_proj": self.num_heads, **gate}

    def new_state(self, batch: int, max_length: int) -> NoState | AttentionState:
        """The window of `near` and the keys of an indexer of its own; nothing where it has neither."""
        if self.config.near is None and self.indexer is None:
            return NoState()
        return AttentionState.empty(max_length, self.config.near, self.index_pool)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.sinks is not None:
            nn.init.normal_(self.sinks, std=std)
        if self.near_branch is not None and self.near_branch.sinks is not None:
            nn.init.normal_(self.near_branch.sinks, std=std)
