"""Grouped-query softmax attention, dense, windowed or over the keys an indexer selects.

    q_t = rope(norm(W_q x_t)),  k_t = rope(norm(W_k x_t)),  v_t = W_v x_t
    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s,   y_t = W_o (o_t * sigmoid(W_g x_t))

Sources: Ainslie et al. 2023 (GQA); output gate and norm per head: Qwen3-Next; norm over all heads: MiniMax-M2, OLMo 2;
window and sinks: gpt-oss.
B rows, T tokens, S keys, D hidden size, W width of the input, H query heads, G key/value heads, K head dim,
k selected keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import AttentionState
from hybridlm.model.decode_step import DecodeStep, attend_one, linear_step, norm_step
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.attention_weights import fold_key_factor, take_attention_projections
from hybridlm.model.mixers.common.chosen_blocks import CHOSEN_BLOCKS, ChosenBlocksConfig
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size
from hybridlm.model.mixers.common.first_tokens import mean_look_back, window_and_first_attention
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.indexed_attention import IndexedMixer, IndexedMixerConfig
from hybridlm.model.mixers.common.indexer import IndexerConfig
from hybridlm.model.mixers.common.key_sharing import KEYS_VALUES, HeadNorm, KeyLayout, rotated_heads
from hybridlm.model.mixers.common.masks import MaskConfig, masked_attention
from hybridlm.model.mixers.common.output_gate import OutputGate, apply_output_gate, build_output_gate, gate_width
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.rope import RopeConfig, rotate_step
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import LAYER_INPUT, SharedKind, SharedRead


@dataclass(kw_only=True)
class AttentionConfig(GroupedHeadsConfig, IndexedMixerConfig):
    """Configuration of grouped-query attention.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.
        rope: rotary embedding of queries and keys.
        qk_norm: `head` normalises q and k per head, `full` over all heads together, before they are split.
        qk_norm_eps: null takes the model's.
        output_gate: a sigmoid gate per element or per head of the output.
        qkv_bias: biases of q_proj, k_proj, v_proj and g_proj.
        o_bias: bias of o_proj.
        window: keys that a token sees, its own included; null sees all earlier ones.
        first_tokens: keys at the start of its document that a token sees beside the window (StreamingLLM).
        sinks: one learned logit per head that takes part in the softmax and carries no value.
        indexer: reads only the keys that it selects (DeepSeek sparse attention).
        mask: a pattern of visible keys in place of a window: chunks, strides, powers of two, blocks.
        key_input: layer whose input keys and values are projected from, in place of this layer's own: its index, or
            the name of a mixer, whose nearest earlier layer is taken.
        key_scale: factor of the keys as they are projected (Falcon-H1).
        choose_blocks: chooses, by its own attention, the blocks of keys that later layers read (HySparse).
    """

    kind: str = "attention"
    takes_wide_input: ClassVar[bool] = True
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: HeadNorm = "none"
    qk_norm_eps: float | None = None
    output_gate: OutputGate = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    window: int | None = None
    first_tokens: int = 0
    sinks: bool = False
    indexer: IndexerConfig | None = None
    mask: MaskConfig | None = None
    key_input: int | str | None = None
    key_scale: float = 1.0
    choose_blocks: ChosenBlocksConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.key_scale != 0, "key_scale", "must not be 0", got=self.key_scale)
        self.rope.check(self.head_dim)
        self.check_window(self.window)
        require(self.first_tokens >= 0, "first_tokens", "must not be negative", got=self.first_tokens)
        require(self.first_tokens == 0 or self.window is not None, "first_tokens", "needs a window",
                got=self.first_tokens, expected="0 where a token sees all earlier ones")
        require(self.first_tokens == 0 or not self.sinks, "first_tokens", "cannot stand beside sinks",
                got=self.first_tokens, expected="0")
        if self.mask is not None:
            require(self.window is None, "window", "cannot stand beside a mask", got=self.window, expected="null",
                    hint="masks other than chunk and fixed have a window of their own, mask.size")
            require(self.indexer is None, "indexer", "cannot stand beside a mask", got="an indexer", expected="null")
        for key, absent in (("window", None), ("indexer", None), ("mask", None)):
            require(self.choose_blocks is None or getattr(self, key) is absent, key,
                    "cannot stand beside choose_blocks, which chooses among all keys", got=getattr(self, key),
                    expected="null")
        if self.indexer is not None:
            require(self.window is None, "window", "cannot stand beside an indexer", got=self.window, expected="null")
            require(not self.sinks, "sinks", "cannot stand beside an indexer", got=True, expected="false")
            require(self.key_input is None, "key_input", "cannot stand beside an indexer", got=self.key_input,
                    expected="null")
            require(not self.residual.embedding, "residual.embedding", "cannot stand beside an indexer", got=True,
                    expected="false")
            self.indexer.check_rope(self.index_rope_dim)

    @property
    def seen_window(self) -> int | None:
        """Newest keys that a decode state has to keep, the next token's own included; None: all."""
        return self.window if self.mask is None else self.mask.kept_keys

    @property
    def index_rope_dim(self) -> int:
        return int(self.head_dim * self.rope.partial_rotary_factor)

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        kept = () if self.first_tokens or self.mask else (KEYS_VALUES,)  # readers know one window alone
        chosen = () if self.choose_blocks is None else (CHOSEN_BLOCKS,)
        return (*super().leaves(context), *kept, *chosen)

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        own = () if self.key_input is None else (SharedRead(LAYER_INPUT, self.key_input, "key_input"),)
        return (*super().reads(context), *own)

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any:
        if kind == CHOSEN_BLOCKS:
            assert self.choose_blocks is not None
            return self.choose_blocks
        if kind != KEYS_VALUES:
            return super().shared_layout(kind, context)
        return KeyLayout(self.num_heads, self.kv_heads, self.head_dim, self.rope, self.window)

    def transfer_gaps(self) -> list[str]:
        return self.indexer_gaps()

    def num_params(self, context: LayerContext) -> int:
        D, W, H, G, K = (context.hidden_size, context.mixer_width, self.num_heads, self.kv_heads, self.head_dim)
        gate = gate_width(self.output_gate, H, K)
        count = D * H * K + W * (H * K + 2 * G * K + gate)
        count += (H * K + 2 * G * K + gate) * self.qkv_bias + D * self.o_bias + H * self.sinks
        count += {"none": 0, "head": 2 * K, "full": (H + G) * K}[self.qk_norm]
        return count + (0 if self.indexer is None else self.indexer.num_params(context, D))

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D, W, H, G, K = (context.hidden_size, context.mixer_width, self.num_heads, self.kv_heads, self.head_dim)
        gate = gate_width(self.output_gate, H, K)
        indexer = self.reading_indexer(context)
        if self.mask is not None:
            keys = self.mask.visible_keys(context_length)
        elif indexer is None:
            keys = count_visible_keys(context_length, self.window)
            keys += self.first_tokens * max(0.0, 1 - (self.window or 0) / context_length)
        else:
            keys = indexer.read_keys(context_length)
        parts = {"projections": 2.0 * (D * H * K + W * (H * K + 2 * G * K + gate)), "attention": 4.0 * H * K * keys}
        if indexer is not None:
            parts["indexer"] = indexer.flops_per_token(context, D, context_length)
        if self._chooses(context, context_length):
            parts["selector"] = 2.0 * H * K * count_visible_keys(context_length)
        return parts

    def _chooses(self, context: LayerContext, context_length: int) -> bool:
        """Whether blocks are chosen: later layers read them, and not all keys fit into their budget."""
        chooser = self.choose_blocks
        return chooser is not None and chooser.selects(context_length) and context.is_read(CHOSEN_BLOCKS)

    def forward_only_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        chosen = self.flops_per_token(context, context_length).get("selector", 0.0)
        return super().forward_only_flops_per_token(context, context_length) + chosen

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        indexer, width = self.reading_indexer(context), self.num_heads * self.head_dim
        return 0.0 if indexer is None else indexer.kl_flops_per_token(
            context, context.hidden_size, context_length, width)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tokens = rows * length * element_bytes
        dense = tokens * attention_exchange_size(self.num_heads, self.kv_heads, self.head_dim, shards)
        indexer, keys = self.reading_indexer(context), self.kv_heads * self.head_dim
        if indexer is None:
            chosen = [ShardTraffic("gather", tokens * keys, 0)] if self._chooses(context, length * shards) else []
            return [ShardTraffic("exchange", dense, dense), *chosen]
        return indexer.shard_traffic(tokens, length * shards, dense, keys, 2 * keys)

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        kept = context_length
        if self.seen_window is not None:
            kept = min(context_length, self.seen_window - 1 + self.first_tokens)
        index = 0 if self.indexer is None else self.indexer.state_bytes(context_length, element_bytes)
        return kept * 2 * self.kv_heads * self.head_dim * element_bytes + index

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        copies = 1 + (self.qk_norm != "none")  # inputs of the norm, and inputs of attention
        gate = 2 * queries if self.output_gate == "element" else 0
        return element_bytes * (copies * (queries + keys) + keys + queries + gate)

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data["qk_norm_eps"] = None if self.qk_norm == "none" else self.qk_norm_eps or norm.eps
        return data

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        filled = super().fill_sizes(options, model)
        if isinstance(filled.get("choose_blocks"), Mapping):
            filled["choose_blocks"] = ChosenBlocksConfig.fill_sizes(filled["choose_blocks"], model.max_position)
        return filled

    def can_take_indexer(self) -> bool:
        return super().can_take_indexer() and self.choose_blocks is None

    def sees_all_keys(self) -> bool:
        return self.window is None and self.mask is None and not self.sinks

    def adapted_to(self, old: MixerConfig) -> Self:
        """The same attention with everything but its window as in `old`, where that is attention of this kind."""
        if not isinstance(old, AttentionConfig):
            return self
        others = {f.name: copy.deepcopy(getattr(old, f.name)) for f in fields(old)}
        own = {"window": self.window, "first_tokens": self.first_tokens, "indexer": self.indexer,
               "mask": self.mask, "choose_blocks": self.choose_blocks}
        return replace(self, **others | own | {"sinks": old.sinks and not self.first_tokens})

    def with_window(self, window: int, first_tokens: int) -> Self:
        window = window if self.window is None else min(window, self.window)
        return replace(copy.deepcopy(self), window=window, first_tokens=first_tokens, indexer=None, sinks=False,
                       mask=None, choose_blocks=None)

    def key_factor(self) -> float:
        return self.key_scale

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """All weights of attention that differs in its window alone, else the projections that fit."""
        options = ("qk_norm", "output_gate", "qkv_bias", "o_bias", "key_scale")
        if isinstance(old, AttentionConfig) and old.projection_heads() == self.projection_heads() and all(
                getattr(old, option) == getattr(self, option) for option in options):
            left_out = ("indexer.", *(() if self.sinks and old.sinks else ("sinks",)))
            return {name: value.detach().clone() for name, value in tensors.items() if not name.startswith(left_out)}
        found = take_attention_projections(old, tensors, self.projection_heads(), norm)
        return {**fold_key_factor(found, 1 / self.key_scale)}


@register_mixer("attention", AttentionConfig)
class Attention(IndexedMixer):
    """The module: q_proj, k_proj, v_proj, o_proj, and by option g_proj, q_norm, k_norm, sinks [H] and indexer."""

    fp32_parameters: ClassVar[tuple[str, ...]] = (*IndexedMixer.fp32_parameters, "q_norm.weight", "sinks")

    def __init__(self, config: AttentionConfig, context: LayerContext):
        super().__init__(config.indexer, context)
        self.config = config
        D, W, H, G, K = (context.hidden_size, context.mixer_width, config.num_heads, config.kv_heads, config.head_dim)
        self.q_proj = nn.Linear(W, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(W, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(W, G * K, bias=config.qkv_bias)
        self.g_proj = build_output_gate(config.output_gate, W, H, K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm.of(context.norm, H * K if full else K, config.qk_norm_eps)
            self.k_norm = RMSNorm.of(context.norm, G * K if full else K, config.qk_norm_eps)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None
        self.rotary_dim = config.rope.rotary_dim(K)
        self.keys_are_read = context.is_read(KEYS_VALUES)
        self.blocks_are_read = context.is_read(CHOSEN_BLOCKS)
        self.key_source: int | None = None
        if config.key_input is not None:
            self.key_source = context.source_of(SharedRead(LAYER_INPUT, config.key_input, "key_input"))
        self.build_indexer(context, D, config.rope, config.index_rope_dim)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: AttentionState | None = None) -> tuple[Tensor, Aux]:
        q_BTHK = self._heads(self.q_proj(x_BTD), self.q_norm, seq)
        key_input_BTD = self._key_input(x_BTD, seq)
        k_BSGK = self._heads(self._keys(key_input_BTD), self.k_norm, seq)
        v_BSGK = self.v_proj(key_input_BTD).unflatten(-1, (-1, self.config.head_dim))
        if state is not None:
            k_BSGK, v_BSGK = state.keys.append(k_BSGK), state.values.append(v_BSGK)
        if self.keys_are_read:
            seq.leave(KEYS_VALUES, self.layer_index, (k_BSGK, v_BSGK))
        if self.blocks_are_read:
            assert self.config.choose_blocks is not None
            chosen_BTGN = self.config.choose_blocks.choose(q_BTHK, k_BSGK, seq, self.sinks)
            seq.leave(CHOSEN_BLOCKS, self.layer_index, chosen_BTGN)
        selection = self.select(x_BTD, x_BTD, seq, None if state is None else state.index_keys)
        if selection.indices is not None:
            k_BSGK, v_BSGK = seq.history(k_BSGK), seq.history(v_BSGK)
        aux: Aux = {}
        if self.config.mask is not None:
            o_BTHK = masked_attention(q_BTHK, k_BSGK, v_BSGK, seq, self.config.mask, layer=self.layer_index,
                                      sinks_H=self.sinks, seen=None if state is None else state.keys.length)
        elif self.config.first_tokens:
            assert self.config.window is not None
            o_BTHK = window_and_first_attention(
                q_BTHK, k_BSGK, v_BSGK, seq, window=self.config.window, first_tokens=self.config.first_tokens,
                seen=None if state is None else state.keys.length)
        else:
            o_BTHK, aux = self.attend(q_BTHK, k_BSGK, v_BSGK, seq, selection, window=self.config.window,
                                      sinks_H=self.sinks)
        return self.o_proj(apply_output_gate(o_BTHK, x_BTD, self.g_proj, self.config.output_gate)), aux

    def _key_input(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """The tensor that keys and values are projected from: x, or the input of an earlier layer."""
        return x_BTD if self.key_source is None else seq.read(LAYER_INPUT, self.key_source)

    def _keys(self, x_BTD: Tensor) -> Tensor:
        scale = self.config.key_scale
        return self.k_proj(x_BTD) if scale == 1.0 else scale * self.k_proj(x_BTD)

    def _heads(self, projected: Tensor, norm: RMSNorm | None, seq: SequenceInfo) -> Tensor:
        return rotated_heads(projected, norm, self.config.qk_norm, self.config.head_dim, self.config.rope, seq)

    def prepare_step(self) -> DecodeStep | None:
        if self.indexer_config is not None or self.sinks is not None or self.config.first_tokens:
            return None
        if self.blocks_are_read or self.key_source is not None:
            return None
        if self.config.mask is not None or self.config.key_scale != 1.0:
            return None
        config = self.config
        q_proj, k_proj, v_proj, o_proj = map(linear_step, (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        g_proj = None if self.g_proj is None else linear_step(self.g_proj)
        q_norm, k_norm = (None if norm is None else norm_step(norm) for norm in (self.q_norm, self.k_norm))
        full, heads = config.qk_norm == "full", (-1, 1, config.num_heads, config.head_dim)
        keys = (-1, 1, config.kv_heads, config.head_dim)

        def split(projected: Tensor, shape: tuple[int, ...], norm: Callable[[Tensor], Tensor] | None) -> Tensor:
            if norm is None:
                return projected.view(shape)
            return norm(projected).view(shape) if full else norm(projected.view(shape))

        def step(x_B1D: Tensor, seq: SequenceInfo, state: AttentionState) -> Tensor:
            qk_B1XK = torch.cat([split(q_proj(x_B1D), heads, q_norm), split(k_proj(x_B1D), keys, k_norm)], 2)
            qk_B1XK = rotate_step(qk_B1XK, config.rope, self.rotary_dim, seq)
            k_BSGK = state.keys.append(qk_B1XK[:, :, config.num_heads :])
            v_BSGK = state.values.append(v_proj(x_B1D).view(keys))
            if self.keys_are_read:
                seq.leave(KEYS_VALUES, self.layer_index, (k_BSGK, v_BSGK))
            o_BHK = attend_one(qk_B1XK[:, 0, : config.num_heads], k_BSGK, v_BSGK, seq)
            return o_proj(apply_output_gate(o_BHK.unsqueeze(1), x_B1D, g_proj, config.output_gate))

        return step

    @property
    def decodes_padded_rows(self) -> bool:
        plain = self.indexer_config is None and self.config.mask is None
        return plain and self.sinks is None and not self.config.first_tokens and not self.blocks_are_read

    @torch.no_grad()
    def look_back(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        q_BTHK = self._heads(self.q_proj(x_BTD), self.q_norm, seq)
        k_BTGK = self._heads(self._keys(self._key_input(x_BTD, seq)), self.k_norm, seq)
        return mean_look_back(q_BTHK, k_BTGK, seq.positions_BT, window=self.config.window)

    def output_projection(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.config.num_heads

    def without_linear_branch(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        return self(x_BTD, seq)[0]

    def head_rows(self) -> dict[str, int]:
        heads, groups = self.config.num_heads, self.config.kv_heads
        return {"q_proj": heads, "k_proj": groups, "v_proj": groups,
                **({"g_proj": heads} if self.config.output_gate == "element" else {})}

    def new_state(self, batch: int, max_length: int) -> AttentionState:
        return AttentionState.empty(max_length, self.config.seen_window, self.index_pool, self.config.first_tokens)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.sinks is not None:
            nn.init.normal_(self.sinks, std=std)
