"""Differential attention: the difference of two softmax maps over the same values.

    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,      lambda_init = 0.8 - 0.6 exp(-0.3 layer)
    o_t = softmax(q1_t k1^T / sqrt(K)) v - lambda softmax(q2_t k2^T / sqrt(K)) v
    y_t = W_o ((1 - lambda_init) norm(o_t))

Heads 2 i and 2 i + 1 of queries and keys are the two maps of pair i; its values are the 2 K dims of two heads. By
option keys and values are those of an earlier layer of this kind (the second half of Phi-4-mini-flash).

Sources: Ye et al. 2024, Differential Transformer, section 2.1; Ren et al. 2025 (Phi-4-mini-flash-reasoning).
B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, K head dim, P = H / 2 pairs, L = 2 K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import AttentionState, NoState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.cost import count_visible_keys
from hybridlm.model.mixers.common.dense_attention import (
    attention_exchange_size,
    check_heads,
    dense_attention,
    heads_of_all_tokens,
)
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.key_sharing import KeyLayout
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind, SharedRead
from hybridlm_kernels import attention, rms_norm
from hybridlm_kernels.precision import wide

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
# Rotated keys and values, two heads side by side: two tensors [B, S, G / 2, 2 K].
PAIRED_KEYS_VALUES = SharedKind("the keys and values of differential attention", gradient=True)


@dataclass(kw_only=True)
class DifferentialAttentionConfig(GroupedHeadsConfig):
    """Configuration of differential attention.

    Args:
        num_heads: query heads H, two for each pair of maps.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G, an even number; null is `num_heads`.
        rope: rotary embedding of queries and keys.
        qkv_bias: biases of q_proj, k_proj and v_proj.
        o_bias: bias of o_proj.
        window: keys that a token sees, its own included; null sees all earlier ones.
        norm_weight: whether the norm of a pair's output has a weight, one for all pairs.
        norm_eps: of that norm.
        lambda_std: standard deviation of the vectors of lambda at the start.
        share_keys: reads the keys and values of an earlier layer of this kind and makes none: `num_kv_heads` is that of
            that layer, head dims and rotation must be.
        source: layer whose keys are read: its index, or the name of a mixer, whose nearest earlier layer is read; null
            is the nearest earlier layer that makes some.

    Raises:
        ConfigError: heads that do not form pairs, and as for `GroupedHeadsConfig`.
    """

    kind: str = "differential_attention"
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    o_bias: bool = False
    window: int | None = None
    norm_weight: bool = True
    norm_eps: float = 1e-5
    lambda_std: float = 0.1
    share_keys: bool = False
    source: int | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.share_keys or self.source is None, "source", "names a layer whose keys are read", got=self.source,
                expected="null, or share_keys=true")
        for key, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            require(heads % 2 == 0, key, "must be even: two heads are one difference", got=heads)
        self.rope.check(self.head_dim)
        self.check_window(self.window)
        for key in ("norm_eps", "lambda_std"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    @property
    def key_read(self) -> SharedRead:
        """The keys and values that the layer reads where it shares them."""
        return SharedRead(PAIRED_KEYS_VALUES, self.source, "share_keys" if self.source is None else "source")

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        return () if self.share_keys else (PAIRED_KEYS_VALUES,)

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        return (self.key_read,) if self.share_keys else ()

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any:
        if kind != PAIRED_KEYS_VALUES:
            return super().shared_layout(kind, context)
        return KeyLayout(self.num_heads, self.kv_heads, self.head_dim, self.rope, self.window)

    def keys(self, context: LayerContext) -> KeyLayout:
        """Heads, rotation and window of the keys that are read, own ones or those of an earlier layer."""
        if not self.share_keys:
            return KeyLayout(self.num_heads, self.kv_heads, self.head_dim, self.rope, self.window)
        layout: KeyLayout = context.shared_layout(self.key_read)
        return layout if self.window is None else replace(layout, window=self.window)

    def check_sources(self, context: LayerContext) -> None:
        if not self.share_keys:
            return
        layout: KeyLayout = context.shared_layout(self.key_read)
        reads = f"reads keys of another form, those of layer {context.source_of(self.key_read)}"
        require(self.head_dim == layout.head_dim, "head_dim", reads, got=self.head_dim, expected=str(layout.head_dim))
        self.rope.check_same(layout.rope, reads)
        require(self.num_heads % layout.num_kv_heads == 0, "num_heads",
                "must be a multiple of the key/value heads that are read", got=self.num_heads,
                expected=f"a multiple of {layout.num_kv_heads}")
        require(self.window is None or layout.window is None or self.window <= layout.window, "window",
                "must not be wider than that of the layer that is read", got=self.window,
                expected=f"at most {layout.window}")

    @property
    def made_heads(self) -> int:
        """Key/value heads that the layer makes itself."""
        return 0 if self.share_keys else self.kv_heads

    def num_params(self, context: LayerContext) -> int:
        D, H, G, K = context.hidden_size, self.num_heads, self.made_heads, self.head_dim
        biases = (H + 2 * G) * K * self.qkv_bias + D * self.o_bias
        return 2 * D * (H + G) * K + biases + 2 * K * self.norm_weight + len(LAMBDAS) * K

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        H, G, K = self.num_heads, self.made_heads, self.head_dim
        keys = count_visible_keys(context_length, self.keys(context).window)
        return {"projections": 4.0 * context.hidden_size * (H + G) * K, "attention": 6.0 * H * K * keys}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        kept = context_length if self.window is None else min(context_length, self.window - 1)
        return kept * 2 * self.made_heads * self.head_dim * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        queries, keys = self.num_heads * self.head_dim, self.made_heads * self.head_dim
        return element_bytes * (2 * (queries + keys) + keys + 5 * queries)

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_heads(self.num_heads // 2, shards)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        groups = self.keys(context).num_kv_heads // 2
        pair = attention_exchange_size(self.num_heads // 2, groups, 2 * self.head_dim, shards)
        sent = rows * length * element_bytes * pair
        return [ShardTraffic("exchange", sent, sent)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        del data["lambda_std"]  # it says how weights start
        return data | {"num_kv_heads": None} if self.share_keys else data

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads of the nearest mixer; where their number is odd, twice as many of half the dims."""
        sizes = super().sizes_from(options, model)
        if sizes["num_heads"] % 2:
            sizes |= {"num_heads": 2 * sizes["num_heads"], "head_dim": max(sizes["head_dim"] // 2, 2)}
        if options.get("share_keys") is True:
            return sizes | {"num_kv_heads": None}
        if groups := sizes.get("num_kv_heads"):
            sizes["num_kv_heads"] = groups if groups % 2 == 0 else 2 * groups
        return sizes

    @classmethod
    def idle_options(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        return {"num_kv_heads": "share_keys=true"} if options.get("share_keys") is True else {}

    def state_heads(self) -> int:
        """Pairs of key/value heads."""
        return self.kv_heads // 2

    def with_state_heads(self, count: int) -> Self:
        return super().with_state_heads(2 * count)

    def rotates(self) -> bool:
        return self.rope.kind != "none"


@register_mixer("differential_attention", DifferentialAttentionConfig)
class DifferentialAttention(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj, lambda_q1, lambda_k1, lambda_q2, lambda_k2 [K], by option o_norm.

    A layer that shares keys has no k_proj and v_proj.
    """

    config: DifferentialAttentionConfig
    fp32_parameters: ClassVar[tuple[str, ...]] = (*LAMBDAS, "o_norm.weight")

    def __init__(self, config: DifferentialAttentionConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.made_heads, config.head_dim
        config.check_sources(context)
        self.layer_index, self.window = context.layer_index, config.keys(context).window
        self.key_source = context.source_of(config.key_read) if config.share_keys else -1  # no layer
        self.keys_are_read = context.is_read(PAIRED_KEYS_VALUES)
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias) if G else None
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias) if G else None
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        self.o_norm = RMSNorm(2 * K, config.norm_eps) if config.norm_weight else None
        for name in LAMBDAS:
            setattr(self, name, nn.Parameter(torch.zeros(K)))
        self.rotary_dim = config.rope.rotary_dim(K)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * context.layer_index)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo,
                state: AttentionState | NoState | None = None) -> tuple[Tensor, Aux]:
        q_BTPL = self._pairs(self.q_proj(x_BTD), seq)
        k_BSPL, v_BSPL = self._keys_and_values(x_BTD, seq, state)
        k_BSPL, v_BSPL = k_BSPL.to(q_BTPL.dtype), v_BSPL.to(q_BTPL.dtype)
        o_BTPL = self._difference(q_BTPL, k_BSPL, v_BSPL, seq)
        weight_L = torch.ones_like(o_BTPL[0, 0, 0]) if self.o_norm is None else self.o_norm.weight
        o_BTPL = rms_norm(o_BTPL, weight_L, self.config.norm_eps) * (1.0 - self.lambda_init)
        return self.o_proj(o_BTPL.to(x_BTD.dtype).flatten(-2)), {}

    def _keys_and_values(self, x_BTD: Tensor, seq: SequenceInfo,
                         state: AttentionState | NoState | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, P, 2 K] of all tokens that queries may see, own ones or those of an earlier layer."""
        if self.k_proj is None or self.v_proj is None:
            read: tuple[Tensor, Tensor] = seq.read(PAIRED_KEYS_VALUES, self.key_source)
            return read
        k_BSPL = self._pairs(self.k_proj(x_BTD), seq)
        v_BSPL = self.v_proj(x_BTD).unflatten(-1, (-1, 2 * self.config.head_dim))
        if isinstance(state, AttentionState):
            k_BSPL, v_BSPL = state.keys.append(k_BSPL), state.values.append(v_BSPL)
        if self.keys_are_read:
            seq.leave(PAIRED_KEYS_VALUES, self.layer_index, (k_BSPL, v_BSPL))
        return k_BSPL, v_BSPL

    def _pairs(self, projected: Tensor, seq: SequenceInfo) -> Tensor:
        """Rotated heads, two side by side [B, T, P, 2 K]."""
        x_BTHK = projected.unflatten(-1, (-1, self.config.head_dim))
        return rotate(x_BTHK, self.config.rope, self.rotary_dim, seq).flatten(-2).unflatten(
            -1, (-1, 2 * self.config.head_dim))

    def _difference(self, q_BTPL: Tensor, k_BSPL: Tensor, v_BSPL: Tensor, seq: SequenceInfo) -> Tensor:
        window, shard = self.window, seq.shard
        if shard is None:
            first, second = (dense_attention(q, k, v_BSPL, seq, window=window)
                             for q, k in zip(q_BTPL.chunk(2, -1), k_BSPL.chunk(2, -1), strict=True))
            return self._subtract(first, second)
        q, k, v = heads_of_all_tokens(shard, [q_BTPL], [k_BSPL, v_BSPL])
        first, second = (attention(q_i, k_i, v, window=window, cu_seqlens=shard.borders)
                         for q_i, k_i in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))
        return shard.by_tokens(self._subtract(first, second))

    def _subtract(self, first: Tensor, second: Tensor) -> Tensor:
        """The first map's output less lambda times the second's, in fp32 at least."""
        q1, k1, q2, k2 = (getattr(self, name) for name in LAMBDAS)
        weight = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init
        return wide(first) - weight * wide(second)

    @property
    def decodes_padded_rows(self) -> bool:
        return not self.config.share_keys or self.config.window is None  # padded rows read all keys that are kept

    def head_rows(self) -> dict[str, int]:
        own = {} if self.config.share_keys else dict.fromkeys(("k_proj", "v_proj"), self.config.kv_heads)
        return {"q_proj": self.config.num_heads, **own}

    def new_state(self, batch: int, max_length: int) -> AttentionState | NoState:
        return NoState() if self.config.share_keys else AttentionState.empty(max_length, self.config.window)

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std), the vectors of lambda normal(0, lambda_std)."""
        init_projections(self, std)
        for name in LAMBDAS:
            nn.init.normal_(getattr(self, name), std=self.config.lambda_std)
