"""Grouped-query softmax attention to the blocks of keys that a selector chooses for each token.

    q_t = rope(norm(W_q x_t)),   k_t = rope(norm(W_k x_t)),   v_t = W_v x_t
    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s,    s in the chosen blocks of t's document and in its window, s <= t
    y_t = W_o (o_t * sigmoid(W_g x_t))

The selector is an option: mean keys (MoBA), overlapping mean keys (InfLLM-v2), bounds (Quest), a distilled gate
(SeerAttention-R), index heads (MSA of MiniMax-M3, QSA). With `mode: dense` the same weights attend to all keys.

Sources: Lu et al. 2025 (MoBA); Zhao et al. 2025 (InfLLM-v2); arXiv 2606.13392 (MSA); others in the files of selectors.
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import EntryCache, TokenCache
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.attention_weights import fold_key_factor, take_grouped_projections
from hybridlm.model.mixers.common.block_selection import (
    SELECTORS,
    BlockBudget,
    BlockHeads,
    Selector,
    SelectorConfig,
    SelectorInputs,
    check_budget,
    choose_blocks,
    fill_block_sizes,
)
from hybridlm.model.mixers.common.cost import count_block_keys, count_visible_keys
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, dense_attention
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.indexer import longest_document
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.key_sharing import HeadNorm
from hybridlm.model.mixers.common.output_gate import OutputGate, apply_output_gate, build_output_gate, gate_width
from hybridlm.model.mixers.common.selector_loss import KeyTargets, Pooling, observe_selector, selector_trains
from hybridlm.model.mixers.contract import AttentionMode, Aux, MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import selected_attention
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class BlockAttentionConfig(GroupedHeadsConfig):
    """Configuration of attention to selected blocks.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.
        rope: rotary embedding of queries and keys.
        qk_norm: `head` normalises q and k per head.
        qk_norm_eps: null takes the model's.
        output_gate: a sigmoid gate per element or per head of the output.
        qkv_bias: biases of q_proj, k_proj, v_proj and g_proj.
        sinks: one learned logit per head that takes part in the softmax and carries no value.
        selector: scores the blocks.
        block: tokens per block, counted from the start of the document.
        topk: blocks that a token reads, its own and those of `first` and `local` included.
        first: first blocks of the document that are always read.
        local: newest blocks that are always read, the token's own included. With 0 its own block is read besides the
            `topk` until it is complete, and competes from then on.
        local_window: a token also reads so many of the last tokens, in the same softmax; blocks inside it do not
            compete.
        target: attention that a learning selector follows is pooled over a block by its `max` or its `sum`.
        mode: `dense` attends to all keys with the same weights, as before a stage of sparse training.
    """

    kind: str = "block_attention"
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: HeadNorm = "none"
    qk_norm_eps: float | None = None
    output_gate: OutputGate = "none"
    qkv_bias: bool = False
    sinks: bool = False
    selector: SelectorConfig = field(default_factory=lambda: SELECTORS.default_config())
    block: int = 64
    topk: int = 16
    first: int = 0
    local: int = 1
    local_window: int | None = None
    target: Pooling = "max"
    mode: AttentionMode = "sparse"
    loss_names: ClassVar[tuple[str, ...]] = ("selector_kl",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rope.check(self.head_dim)
        self.check_window(self.local_window)
        require(self.qk_norm != "full", "qk_norm", "is per head or none", got=self.qk_norm, expected="head or none")
        check_budget(self.block, self.budget)
        require(not self.selector.weighs or (self.local > 0 and self.local_window is None), "selector",
                "weighs blocks beside the newest ones", got=self.selector.kind,
                expected="local of at least 1, and local_window=null")
        self.selector.check(self.block_heads)

    @property
    def block_heads(self) -> BlockHeads:
        """Sizes that the selector needs."""
        return BlockHeads(self.num_heads, self.kv_heads, self.head_dim, self.block, self.rope, self.topk, self.local)

    @property
    def budget(self) -> BlockBudget:
        """Number of blocks that are read."""
        return BlockBudget(self.topk, self.first, self.local, self.local_window)

    def num_params(self, context: LayerContext) -> int:
        D, H, G, K = context.hidden_size, self.num_heads, self.kv_heads, self.head_dim
        gate = gate_width(self.output_gate, H, K)
        count = D * (2 * H * K + 2 * G * K + gate) + (H * K + 2 * G * K + gate) * self.qkv_bias + H * self.sinks
        count += 2 * K * (self.qk_norm == "head")
        return count + self.selector.num_params(context, self.block_heads)

    def _selects(self, context_length: int) -> bool:
        """Whether a selector has work to do: one that weighs blocks weighs those of any context."""
        return self.mode == "sparse" and (self.selector.weighs or context_length > self.topk * self.block)

    def read_keys(self, context_length: int) -> float:
        """Mean number of keys that a token reads."""
        if not self._selects(context_length):
            return count_visible_keys(context_length)
        in_blocks = count_block_keys(context_length, self.block, self.topk, self.local > 0)
        return min(count_visible_keys(context_length), in_blocks + (self.local_window or 0))

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D, H, G, K = context.hidden_size, self.num_heads, self.kv_heads, self.head_dim
        gate = gate_width(self.output_gate, H, K)
        parts = {"projections": 2.0 * D * (2 * H * K + 2 * G * K + gate),
                 "attention": 4.0 * H * K * self.read_keys(context_length)}
        if self._selects(context_length):
            parts["selector"] = sum(self.selector.flops_per_token(context, self.block_heads, context_length).values())
        return parts

    def forward_only_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        if self.selector.weighs and self._selects(context_length):
            return self.selector.flops_per_token(context, self.block_heads, context_length)["choice"]
        return self.flops_per_token(context, context_length).get("selector", 0.0)

    def loss_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        """Scores of dense attention for the targets; scores of the selector forward, again and backward."""
        if self.selector.kl_weight == 0:
            return 0.0
        parts = self.selector.flops_per_token(context, self.block_heads, context_length)
        dense = 2.0 * self.num_heads * self.head_dim * count_visible_keys(context_length)
        return dense + 2.0 * parts.get("projections", 0.0) + 4.0 * parts["scores"]

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        numbers = context_length * 2 * self.kv_heads * self.head_dim
        if self.mode == "sparse":
            numbers += self.selector.state_numbers(self.block_heads, context_length)
        return numbers * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        copies = 2 + (self.qk_norm != "none")  # inputs of the norm, of attention, and their order by key head
        gate = 2 * queries if self.output_gate == "element" else 0
        lists = 8 * self.selector.lists(self.block_heads) * (self.topk + 1)
        if self.selector.weighs:  # lists and biases per query head, and entries
            lists += (8 + element_bytes) * self.num_heads * (self.topk + 1) + 2 * element_bytes * queries
        return element_bytes * (copies * (queries + 2 * keys) + queries + gate) + lists

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tokens = rows * length * element_bytes
        keys = tokens * self.kv_heads * self.head_dim
        numbers, have_gradient = self.selector.feature_numbers(self.block_heads)
        learns = self.selector.kl_weight > 0
        features, back = tokens * numbers, tokens * numbers * (have_gradient and (learns or self.selector.weighs))
        if self._selects(length * shards):
            return [ShardTraffic("gather", 2 * keys + features, 2 * keys + back)]
        exchanged = tokens * attention_exchange_size(self.num_heads, self.kv_heads, self.head_dim, shards)
        found = [ShardTraffic("exchange", exchanged, exchanged)]
        return [*found, ShardTraffic("gather", keys + features, back)] if learns else found

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data["qk_norm_eps"] = None if self.qk_norm == "none" else self.qk_norm_eps or norm.eps
        data["rope"] = self.rope.canonical(uses_mscale=False)
        data["selector"] = self.selector.canonical()
        del data["target"]  # says only how the selector is trained
        return data

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads as in the model; blocks of a 64th of its longest context, and an eighth of it to read, at most 4096.

        >>> sizes = BlockAttentionConfig.fill_sizes({"kind": "block_attention"}, ModelSizes(64, max_position=1024))
        >>> sizes["block"], sizes["topk"]
        (16, 8)
        """
        return fill_block_sizes(super().fill_sizes(options, model), model.max_position)

    def has_selector(self) -> bool:
        return True

    def with_attention_mode(self, mode: AttentionMode) -> Self:
        return replace(self, mode=mode)

    def topk_multiple(self) -> int:
        return self.block

    def with_topk(self, topk: int) -> Self:
        return replace(self, topk=topk // self.block)

    def own_losses(self) -> tuple[str, ...]:
        return self.loss_names if self.selector.learns else ()

    def selector_parameters(self) -> tuple[str, ...]:
        return ("selector.*",) if self.selector.learns else ()

    def rotates(self) -> bool:
        return self.rope.kind != "none"

    def adapted_to(self, old: MixerConfig) -> Self:
        """The same mixer with the rotation, norm, gate and biases of `old`."""
        names = ("rope", "qk_norm", "qk_norm_eps", "output_gate", "qkv_bias")
        return replace(self, **{name: copy.deepcopy(getattr(old, name, getattr(self, name))) for name in names})

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """All weights of attention with the same heads and norms, else its projections."""
        same = old.projection_heads() == self.projection_heads() and self.projection_heads()
        if same and getattr(old, "qk_norm", "none") == self.qk_norm:
            left_out = ("indexer.", "selector.", "o_proj.bias", *(() if self.sinks else ("sinks",)),
                        *(() if getattr(old, "output_gate", "none") == self.output_gate else ("g_proj",)))
            kept = {name: value for name, value in fold_key_factor(tensors, old.key_factor()).items()
                    if not name.startswith(left_out)}
            biases = () if self.qkv_bias else ("q_proj.bias", "k_proj.bias", "v_proj.bias", "g_proj.bias")
            return {name: value.detach().clone() for name, value in kept.items() if name not in biases}
        return take_grouped_projections(self, old, tensors, norm, biases=self.qkv_bias)


@dataclass
class BlockAttentionState:
    """Decode state: keys [B, S, G, K], values [B, S, G, K], and the entries of the selector."""

    keys: TokenCache
    values: TokenCache
    entries: EntryCache

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return self.keys.num_bytes + self.values.num_bytes + self.entries.num_bytes


@register_mixer("block_attention", BlockAttentionConfig)
class BlockAttention(SequenceMixer):
    """The module: q_proj, k_proj, v_proj, o_proj, and by option g_proj, q_norm, k_norm, sinks [H] and selector.

    `attention_mode`, `budget` and `kl_weight` may be set at any time: attention to all keys or to the selected blocks,
    the number of these, and the weight of the selector's loss. `measuring`: report the share of dense attention that is
    read, in evaluation too.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("q_norm.weight", "k_norm.weight", "sinks", "landmark")

    def __init__(self, config: BlockAttentionConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.g_proj = build_output_gate(config.output_gate, D, H, K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            self.q_norm, self.k_norm = (RMSNorm.of(context.norm, K, config.qk_norm_eps) for _ in "qk")
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None
        self.selector: Selector = SELECTORS.implementation(config.selector.kind)(config.selector, context,
                                                                                 config.block_heads)
        self.rotary_dim = config.rope.rotary_dim(K)
        self.attention_mode: AttentionMode = config.mode
        self.budget = config.budget
        self.kl_weight = config.selector.kl_weight
        self.measuring = False

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"selector_kl": self.kl_weight}

    def set_attention(self, mode: AttentionMode | None, loss_weights: Mapping[str, float]) -> None:
        self.attention_mode = mode or self.config.mode
        self.kl_weight = loss_weights.get("selector_kl", self.config.selector.kl_weight)

    def set_topk(self, topk: int | None) -> None:
        self.budget = (self.config if topk is None else self.config.with_topk(topk)).budget

    def selected_keys(self) -> int | None:
        return self.budget.topk * self.config.block if self.attention_mode == "sparse" else None

    def freeze_idle_parameters(self, later: Sequence[SequenceMixer] = ()) -> None:
        if self.kl_weight == 0 and not self.config.selector.weighs:
            self.selector.requires_grad_(False)

    def measure_selection(self, on: bool) -> None:
        self.measuring = on

    def forward(self, x_BTD: Tensor, seq: SequenceInfo,
                state: BlockAttentionState | None = None) -> tuple[Tensor, Aux]:
        projected_q = self.q_proj(x_BTD)
        raw_q, raw_k = self._heads(projected_q, self.q_norm), self._heads(self.k_proj(x_BTD), self.k_norm)
        q_BTHK, k_BTGK = (rotate(x, self.config.rope, self.rotary_dim, seq) for x in (raw_q, raw_k))
        v_BSGK = self.v_proj(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        k_BSGK = k_BTGK
        if state is not None:
            k_BSGK, v_BSGK = state.keys.append(k_BTGK), state.values.append(v_BSGK)
        keys = k_BSGK.shape[1] if seq.shard is None else seq.shard.history_length
        weighs = self.config.selector.weighs and self.attention_mode == "sparse"
        longest = longest_document(keys, seq)
        sparse = weighs or (self.attention_mode == "sparse" and longest > self.budget.topk * self.config.block)
        trains = selector_trains(self, self.selector, self.kl_weight)
        learns = state is None and (trains or self.measuring)
        index = None
        keeps_entries = state is not None and self.attention_mode == "sparse"
        if sparse or keeps_entries or learns:
            inputs = SelectorInputs(x_BTD, q_BTHK, k_BTGK, raw_q, raw_k, self._heads(projected_q, None))
            with torch.set_grad_enabled(torch.is_grad_enabled() if weighs else trains):
                index = self.selector(inputs if weighs else inputs.detached(), seq,
                                      None if state is None else state.entries)
        chosen: Tensor | None = None
        bias: Tensor | None = None
        if sparse:
            k_BSGK, v_BSGK = seq.history(k_BSGK), seq.history(v_BSGK)
        if weighs and index is not None:
            index = self.selector.see_keys(index, q_BTHK, k_BSGK, seq)
        if index is not None and (sparse or learns):
            chosen = choose_blocks(self.selector, index, self.budget)
        if not sparse:
            o_BTHK = dense_attention(q_BTHK, k_BSGK, v_BSGK, seq, sinks_H=self.sinks)
            k_BSGK = seq.history(k_BSGK.detach()) if learns else k_BSGK
        else:
            assert chosen is not None
            lists = chosen
            if weighs and index is not None:
                bias = self.selector.bias(index, chosen, q_BTHK, k_BSGK)
                lists = chosen.repeat_interleave(bias.shape[2] // chosen.shape[2], 2)
            o_BTHK, _ = selected_attention(q_BTHK, k_BSGK, v_BSGK, lists, block=self.config.block,
                                           window=self.config.local_window, sinks_H=self.sinks, bias_BTUN=bias,
                                           cu_seqlens=seq.history_borders)
        aux: Aux = {}
        if learns and index is not None:
            targets = KeyTargets(wide(q_BTHK.detach()), wide(k_BSGK.detach()), self.config.target)
            aux = observe_selector("selector", self.selector, index, targets, self.budget, chosen, seq,
                                   only_chosen=sparse, learns=self.config.selector.learns,
                                   compares=not self.config.selector.weighs)
        return self.o_proj(apply_output_gate(o_BTHK, x_BTD, self.g_proj, self.config.output_gate)), aux

    def _heads(self, projected_BTX: Tensor, norm: RMSNorm | None) -> Tensor:
        x_BTHK = projected_BTX.unflatten(-1, (-1, self.config.head_dim))
        return x_BTHK if norm is None else norm(x_BTHK)

    def head_rows(self) -> dict[str, int]:
        heads, groups = self.config.num_heads, self.config.kv_heads
        return {"q_proj": heads, "k_proj": groups, "v_proj": groups,
                **({"g_proj": heads} if self.config.output_gate == "element" else {})}

    def output_projection(self) -> tuple[nn.Linear, int]:
        return self.o_proj, self.config.num_heads

    def new_state(self, batch: int, max_length: int) -> BlockAttentionState:
        return BlockAttentionState(TokenCache(max_length), TokenCache(max_length), self.selector.new_cache(max_length))

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
        if self.sinks is not None:
            nn.init.normal_(self.sinks, std=std)
        self.selector.init_weights(std)
