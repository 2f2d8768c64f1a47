"""Engram: memory of n-grams, whose hashes choose rows of large tables, gated by the stream.

    m_n = XOR over i < n of a_i id_{t-i},   r = m_n mod p   for n = 2 .. N and H heads with primes p of their own
    e = [E[r], ...],   g = sigmoid(sign(s) sqrt(|s|)),   s = <norm(W_k e), x> / sqrt(D)
    u = g W_v e,       y = u + silu(conv(norm(u)))

x is the branch's input behind its norm; conv is causal and depthwise, its taps N tokens apart. N-grams and the
convolution stay inside a document: ids before its start count as `pad_token`. The branch stands alone in a layer in
front of the layer that it is meant for.

Sources: Cheng et al. 2026 (Engram, arXiv 2601.07372), sections 2.2 to 2.4; hash multipliers and sizes of tables as in
the class Qwen4ExpTextNGramEmbedding of transformers.

B rows, T tokens, D hidden size, E width of the looked-up embedding, R = (N - 1) H rows per token, W taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, conv_traffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.token_table import LookupTable, look_up, token_ids
from hybridlm_kernels.precision import wide

ID_BYTES = 8  # bytes per token id in the decode state, and per row index
ROWS_PER_TOKEN_ID = 5  # rows of a head's table over the vocabulary, as in the authors' demonstration
SMALLEST_SCORE = 1e-6  # of |s| under the root, whose slope has no bound at zero
MASK64 = (1 << 64) - 1
LARGEST_INT64 = (1 << 63) - 1
LAYER_SEED_STEP = 10007  # between the seeds of two layers


@dataclass(kw_only=True)
class EngramConfig(MixerConfig):
    """Configuration of Engram.

    Args:
        max_ngram: longest n-gram N; tokens alone are not hashed.
        heads_per_ngram: hashes H of each n-gram, with a table each.
        table_rows: least number of rows of each table, which is the next prime that no earlier one took; null is five
            times the vocabulary.
        embed_dim: width E of all rows of a token together, a multiple of their number; null is the hidden size.
        conv_size: taps W of the convolution.
        pad_token: id that stands for what comes before a document.
        hash_seed: of the multipliers a, which differ between layers.
        table_lr_factor: factor of the learning rate of the tables; they do not decay.
        norm_eps: of the norms of key and convolution; null takes the model's.

    Raises:
        ConfigError: sizes that are too small.
    """

    kind: str = "engram"
    max_ngram: int = 3
    heads_per_ngram: int = 8
    table_rows: int | None = None
    embed_dim: int | None = None
    conv_size: int = 4
    pad_token: int = 0
    hash_seed: int = 0
    table_lr_factor: float = 5.0
    norm_eps: float | None = None
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.max_ngram >= 2, "max_ngram", "must be at least 2", got=self.max_ngram)
        for key in ("heads_per_ngram", "table_rows", "embed_dim", "norm_eps"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        for key in ("pad_token", "hash_seed"):
            require(getattr(self, key) >= 0, key, "must not be negative", got=getattr(self, key))
        check_taps(self.conv_size)
        require(0 < self.table_lr_factor < math.inf, "table_lr_factor", "must be positive and finite",
                got=self.table_lr_factor)

    @property
    def rows_per_token(self) -> int:
        """Rows R that a token looks up."""
        return (self.max_ngram - 1) * self.heads_per_ngram

    @property
    def reach(self) -> int:
        """Tokens that the convolution spans, the current one included."""
        return (self.conv_size - 1) * self.max_ngram + 1

    def width(self, context: LayerContext) -> int:
        """Width E of all rows of a token together.

        Raises:
            ConfigError: it is no multiple of the number of rows.
        """
        width = self.embed_dim or context.hidden_size
        option = "embed_dim" if self.embed_dim else "heads_per_ngram"
        require(width % self.rows_per_token == 0, option, "does not fit: each of the rows of a token gets an equal "
                f"share of {width} numbers", got=getattr(self, option),
                expected=f"a multiple of {self.rows_per_token} numbers: (max_ngram - 1) * heads_per_ngram rows",
                hint="set embed_dim, or fewer heads_per_ngram")
        return width

    def table_sizes(self, context: LayerContext) -> tuple[int, ...]:
        """Rows of each of the R tables: primes that no table of another layer has.

        Raises:
            ConfigError: a `pad_token` that is no token.
        """
        require(self.pad_token < max(context.vocab_size, 1), "pad_token", "is no token", got=self.pad_token,
                expected=f"below the vocabulary of {context.vocab_size}")
        least = self.table_rows or ROWS_PER_TOKEN_ID * max(context.vocab_size, 1)
        first = self._place(context) * self.rows_per_token
        return primes_from(least, first + self.rows_per_token)[first:]

    def multipliers(self, context: LayerContext) -> list[int]:
        """The odd numbers a, one per token of the longest n-gram; their products with ids fit into 63 bits.

        They begin with the second draw, as in transformers.
        """
        most = max(1, LARGEST_INT64 // max(context.vocab_size, 1) // 2)
        seed = self.hash_seed + LAYER_SEED_STEP * self._place(context)
        return [2 * (splitmix64(seed, draw) % most) + 1 for draw in range(2, self.max_ngram + 2)]

    def _place(self, context: LayerContext) -> int:
        """Number of layers before this one that have such a memory, by which hashes of layers differ."""
        before = context.layers[: context.layer_index]
        return sum(isinstance(context.mixers[name], EngramConfig) for name in before)

    def num_params(self, context: LayerContext) -> int:
        D = context.hidden_size
        return self.lookup_params(context) + D * (2 * self.width(context) + self.conv_size + 2)

    def lookup_params(self, context: LayerContext) -> int:
        return sum(self.table_sizes(context)) * (self.width(context) // self.rows_per_token)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D = context.hidden_size
        return {"projections": 4.0 * self.width(context) * D, "conv": 2.0 * self.conv_size * D, "gates": 3.0 * D}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the last N - 1 token ids, and of the last inputs of the convolution in the dtype of the model."""
        return ID_BYTES * (self.max_ngram - 1) + context.hidden_size * (self.reach - 1) * element_bytes

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: rows, key and value around their norms, and the convolution."""
        numbers = self.width(context) + 6 * context.hidden_size
        return element_bytes * numbers + ID_BYTES * self.rows_per_token

    def check_context_parallel(self, shards: int, length: int) -> None:
        require(self.reach <= length + 1, "conv_size", f"reaches over {self.reach} tokens, more than one shard of a "
                "split row", got=self.conv_size, expected=f"at most {length // self.max_ngram + 1} taps",
                hint="a smaller engine.context_parallel, or longer sequences")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        ids = ShardTraffic("from_previous", rows * (self.max_ngram - 1) * ID_BYTES, 0)
        return [ids, *conv_traffic(rows, self.reach, context.hidden_size, element_bytes)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        return {key: value for key, value in super().canonical(norm).items() if key != "table_lr_factor"}


@register_mixer("engram", EngramConfig)
class Engram(TensorStateMixer):
    """Parameters: table [sum of p, E / R], k_proj and v_proj [D, E], k_norm and conv_norm [D], conv [D, W].

    The tables of all heads are one, one behind the other. `multiplier` [N], `prime` [R] and `offset` [R] are buffers
    that follow from the config.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("k_norm.weight", "conv_norm.weight")
    config: EngramConfig
    multiplier: Tensor
    prime: Tensor
    offset: Tensor

    def __init__(self, config: EngramConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, width = context.hidden_size, config.width(context)
        self._sizes, self._multipliers = config.table_sizes(context), config.multipliers(context)
        self.table = LookupTable(sum(self._sizes), width // config.rows_per_token, config.table_lr_factor)
        self.k_proj = nn.Linear(width, D, bias=False)
        self.v_proj = nn.Linear(width, D, bias=False)
        self.k_norm = RMSNorm.of(context.norm, D, config.norm_eps)
        self.conv_norm = RMSNorm.of(context.norm, D, config.norm_eps)
        self.conv = CausalConv(D, config.conv_size, bias=False, dilation=config.max_ngram)
        for name, length in (("multiplier", config.max_ngram), ("prime", config.rows_per_token),
                             ("offset", config.rows_per_token)):
            self.register_buffer(name, torch.zeros(length, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        rows_BTR = self.rows(token_ids(seq, "Engram"), seq, state)
        memory_BTE = look_up(self.table, rows_BTR, x_BTD.device).flatten(-2).to(x_BTD.dtype)
        k_BTD = self.k_norm(self.k_proj(memory_BTE))
        score_BT1 = (wide(k_BTD) * wide(x_BTD)).sum(-1, keepdim=True) * x_BTD.shape[-1]**-0.5
        gate_BT1 = torch.sigmoid(score_BT1.sign() * score_BT1.abs().clamp_min(SMALLEST_SCORE).sqrt())
        v_BTD = self.v_proj(memory_BTE)
        u_BTD = (gate_BT1 * v_BTD).to(v_BTD.dtype)
        return u_BTD + self.conv(self.conv_norm(u_BTD), seq, state), {}

    def rows(self, ids_BT: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> Tensor:
        """The rows of the table that each token looks up, int64 [B, T, R].

        Args:
            ids_BT: ids of the tokens.
            seq: positions, which say where documents begin, and the shard of the rows held here.
            state: decode state that holds the last N - 1 ids, and then those of this call.
        """
        ids_BT = ids_BT.long()
        length, reach = ids_BT.shape[1], self.config.max_ngram - 1
        before_BN = ids_BT.new_zeros(len(ids_BT), reach)
        if seq.shard is not None:
            before_BN = seq.shard.group.from_previous(ids_BT[:, length - reach :])
        elif state is not None:
            before_BN = state.tensors.get("ids", before_BN)
        history_BS = torch.cat([before_BN, ids_BT], 1)
        if state is not None:
            state.tensors["ids"] = history_BS[:, length:].clone()
        mixed_BT = ids_BT * self.multiplier[0]
        mixed = []
        for back in range(1, reach + 1):
            earlier_BT = torch.where(seq.positions_BT >= back, history_BS[:, reach - back : reach - back + length],
                                     self.config.pad_token)
            mixed_BT = mixed_BT ^ (earlier_BT * self.multiplier[back])
            mixed.append(mixed_BT)
        hashes_BTR = torch.stack(mixed, -1).repeat_interleave(self.config.heads_per_ngram, -1)
        return hashes_BTR % self.prime + self.offset

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The convolution is zero, as in the paper; projections and tables are normal(0, std)."""
        init_projections(self, std)
        nn.init.normal_(self.table.weight, std=std)
        nn.init.zeros_(self.conv.weight)
        sizes = torch.tensor(self._sizes)
        self.multiplier.copy_(torch.tensor(self._multipliers))
        self.prime.copy_(sizes)
        self.offset.copy_(sizes.cumsum(0) - sizes)


def splitmix64(seed: int, draw: int) -> int:
    """Number `draw` of the generator SplitMix64 (Steele et al. 2014), 64 bits.

    >>> hex(splitmix64(0, 1)), splitmix64(1234567, 1)
    ('0xe220a8397b1dcdaf', 6457827717110365317)
    """
    value = (seed + 0x9E3779B97F4A7C15 * draw) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


@lru_cache(maxsize=64)
def primes_from(least: int, count: int) -> tuple[int, ...]:
    """The first `count` primes that are at least `least`.

    >>> primes_from(8, 4)
    (11, 13, 17, 19)
    """
    found: list[int] = []
    candidate = max(least, 2)
    while len(found) < count:
        if all(candidate % divisor for divisor in range(2, math.isqrt(candidate) + 1)):
            found.append(candidate)
        candidate += 1
    return tuple(found)
