"""2-simplicial attention: a query attends to pairs of tokens, over two windows.

    score_tsr = sum_c q_tc k_sc (k'_rc + 1 / K) / sqrt(K),      t - w1 < s <= t,  t - w2 < r <= t
    y_t = W_o sum_{s,r} softmax_{s,r}(score_t) v_s * (v'_r + 1)

The constants on second keys and values are those of the published kernel. Where k' = v' = 0, the map is a softmax over
first keys alone.

Source: Roy et al. 2025, Fast and Simplex: 2-Simplicial Attention in Triton, sections 4 and 6.
B rows, T tokens, S and R keys, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TokenCache
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.dense_attention import attention_exchange_size, heads_of_all_tokens
from hybridlm.model.mixers.common.grouped_heads import GroupedHeadsConfig
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.contract import Aux, SequenceMixer, register_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import simplicial_attention

PAIRED = ("k_proj", "v_proj", "k2_proj", "v2_proj")


@dataclass(kw_only=True)
class SimplicialAttentionConfig(GroupedHeadsConfig):
    """Configuration of 2-simplicial attention.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: heads G of both kinds of keys and values; null is `num_heads`.
        window: first keys that a token sees, its own included.
        second_window: second keys that a token sees, its own included.
    """

    kind: str = "simplicial_attention"
    window: int = 512
    second_window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("window", "second_window"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    def num_params(self, context: LayerContext) -> int:
        return context.hidden_size * (2 * self.num_heads + 4 * self.kv_heads) * self.head_dim

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        pairs = count_visible_pairs(context_length, self.window, self.second_window)
        return {"projections": 2.0 * self.num_params(context),
                "attention": 4.0 * self.num_heads * self.head_dim * pairs}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        kept = sum(min(context_length, window - 1) for window in (self.window, self.second_window))
        return kept * 2 * self.kv_heads * self.head_dim * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        return element_bytes * (2 * self.num_heads + 4 * self.kv_heads) * self.head_dim

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        # Keys and values twice: once beside queries and outputs, once without them.
        size = sum(attention_exchange_size(heads, self.kv_heads, self.head_dim, shards)
                   for heads in (self.num_heads, 0))
        return [ShardTraffic("exchange", rows * length * element_bytes * size, rows * length * element_bytes * size)]


def count_visible_pairs(length: int, first: int, second: int) -> float:
    """Mean number of pairs of keys that a token of a causal sequence sees in windows of `first` and `second` tokens.

    >>> count_visible_pairs(3, 3, 2)  # 1, 4 and 6 pairs
    3.6666666666666665
    """
    small, large = sorted((min(first, length), min(second, length)))
    growing = small * (small + 1) * (2 * small + 1) // 6
    half = small * (large * (large + 1) - small * (small + 1)) // 2
    return (growing + half + (length - large) * small * large) / length


@dataclass
class SimplicialState:
    """Decode state: the newest first and second keys and values, [B, S, G, K] each."""

    keys: TokenCache
    values: TokenCache
    second_keys: TokenCache
    second_values: TokenCache

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.num_bytes for part in vars(self).values())


@register_mixer("simplicial_attention", SimplicialAttentionConfig)
class SimplicialAttention(SequenceMixer):
    """Parameters: q_proj, k_proj, v_proj, k2_proj, v2_proj, o_proj."""

    config: SimplicialAttentionConfig

    def __init__(self, config: SimplicialAttentionConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, H, G, K = context.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=False)
        for name in PAIRED:
            setattr(self, name, nn.Linear(D, G * K, bias=False))
        self.o_proj = nn.Linear(H * K, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: SimplicialState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTHK, k_BSGK, v_BSGK, k2_BRGK, v2_BRGK = (
            proj(x_BTD).unflatten(-1, (-1, config.head_dim))
            for proj in (self.q_proj, *(getattr(self, name) for name in PAIRED)))
        tensors = [k_BSGK, v_BSGK, k2_BRGK + 1.0 / config.head_dim, v2_BRGK + 1.0]
        if state is not None:
            caches = (state.keys, state.values, state.second_keys, state.second_values)
            tensors = [cache.append(x) for cache, x in zip(caches, tensors, strict=True)]
        attend = partial(simplicial_attention, window=config.window, second_window=config.second_window)
        if seq.shard is None:
            o_BTHK = attend(q_BTHK, *tensors, cu_seqlens=seq.cu_seqlens)
        else:
            local = heads_of_all_tokens(seq.shard, [q_BTHK], tensors)
            o_BTHK = seq.shard.by_tokens(attend(*local, cu_seqlens=seq.shard.borders))
        return self.o_proj(o_BTHK.flatten(-2)), {}

    def head_rows(self) -> dict[str, int]:
        return {"q_proj": self.config.num_heads, **dict.fromkeys(PAIRED, self.config.kv_heads)}

    def new_state(self, batch: int, max_length: int) -> SimplicialState:
        first, second = self.config.window, self.config.second_window
        return SimplicialState(*(TokenCache(max_length, window) for window in (first, first, second, second)))

    def init_weights(self, std: float) -> None:
        """Projections are normal(0, std): second keys and values start near their constants."""
        init_projections(self, std)
