"""The lightning indexer of DeepSeek sparse attention: picks, for each token, the few keys that attention will read.

    I_ts = sum_j w_tj relu(q_tj . k_s) * Di^-0.5 * Hi^-0.5,   attention reads the `topk` keys s of highest I_ts

Sources: DeepSeek-V3.2 (section 2.1); sharing over layers: GLM-5; its training: IndexCache (arXiv 2603.12201); pooled
keys: GLM-5.3. `indexed` has the mixers that follow it.
B rows, T tokens, S keys, D hidden size, J index heads (Hi), I index head dim (Di), k selected keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import EntryCache, TokenCache
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.cost import count_open_tail, count_visible_keys, count_visible_pools
from hybridlm.model.mixers.common.key_pooling import KeyPool
from hybridlm.model.mixers.module import AttentionMode
from hybridlm.model.mixers.sizing import size_of
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.readable_weights import weight_dtype
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm.plain_data import to_dict
from hybridlm_kernels import Pools, indexer_kl, indexer_topk, pooled_indexer_kl, pooled_topk
from hybridlm_kernels.ops.indexer_kl import IndexerKL

IndexTensors = tuple[Tensor, Tensor, Tensor]  # queries [B, T, J, I], keys [B, T or P, I], head weights [B, T, J]
IndexCache = TokenCache | EntryCache


@dataclass(kw_only=True)
class IndexerConfig:
    """Configuration of an indexer, an option of softmax attention.

    Args:
        num_heads: index heads Hi.
        head_dim: dims per index head Di.
        topk: keys that a token reads.
        num_first: first tokens of the document that are always among the `topk`.
        num_local: last tokens, the token itself included, that are always among the `topk`.
        pool: consecutive tokens that have one key and are selected together (GLM-5.3: 16). Tokens behind the last
            complete pool are read besides the `topk`. Null: one key per token.
        rope_kind: rotation of index queries and keys, with theta and scaling of the mixer's own RoPE.
        rope_dim: dims that rotate, the first ones; null takes as many as the mixer rotates.
        norm_eps: of the keys' LayerNorm.
        loss_weight: of KL(attention || softmax(I)), the loss that trains the indexer; 0 leaves it untrained.
        share: this layer has no indexer of its own and reads the selection of the nearest earlier indexed layer.
        mode: the first value of `mixer.attention_mode`; `dense` keeps the parameters and reads all keys (warm-up).
        form: `relu` sums weighted heads; `dot` is the plain product of one head's query with the key (CLSA).
    """

    num_heads: int = 64
    head_dim: int = 128
    topk: int = 2048
    num_first: int = 0
    num_local: int = 0
    pool: int | None = None
    rope_kind: Literal["half", "interleaved", "none"] = "half"
    rope_dim: int | None = None
    norm_eps: float = 1e-6
    loss_weight: float = 1.0
    share: bool = False
    mode: AttentionMode = "sparse"
    form: Literal["relu", "dot"] = "relu"

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "topk", "norm_eps"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        for key in ("num_first", "num_local", "loss_weight"):
            require(getattr(self, key) >= 0, key, "must not be negative", got=getattr(self, key))
        require(self.num_first + self.num_local <= self.topk, "num_local", "does not fit into topk beside num_first",
                got=self.num_local, expected=f"at most {self.topk - self.num_first}")
        require(self.share or self.form == "relu" or self.num_heads == 1, "num_heads", "must be 1 where form is dot",
                got=self.num_heads, expected="1")
        require(self.pool is None or self.pool > 0, "pool", "must be positive", got=self.pool,
                hint="null has a key for each token")
        for key in ("topk", "num_first", "num_local"):
            require(getattr(self, key) % (self.pool or 1) == 0, key, "must be whole pools", got=getattr(self, key),
                    expected=f"a multiple of {self.pool}")

    def check_rope(self, mixer_dim: int) -> None:
        """Raise ConfigError unless the index heads can be rotated in a mixer that rotates `mixer_dim` dims."""
        dim = mixer_dim if self.rope_dim is None else self.rope_dim
        require(self.share or self.rope_kind == "none" or (0 < dim <= self.head_dim and dim % 2 == 0),
                "indexer.rope_dim", "does not fit the index heads", got=dim,
                expected=f"an even number up to head_dim ({self.head_dim})",
                hint="rope_kind=none turns the rotation off")

    def canonical(self, mixer_rope_dim: int) -> dict[str, Any]:
        """The options that the selection depends on, as plain data.

        Args:
            mixer_rope_dim: dims that the mixer rotates, which `rope_dim: null` follows.
        """
        if self.share:
            return {"share": True, "mode": self.mode}
        data = to_dict(self)
        data.pop("loss_weight")  # says only how the indexer is trained
        if self.rope_kind == "none":
            data["rope_dim"] = None
        elif self.rope_dim is None:
            data["rope_dim"] = mixer_rope_dim
        return data

    @classmethod
    def options_of_source(cls) -> list[str]:
        """The options that a layer takes from the one whose selection it reads, where it has `share`."""
        return [option.name for option in fields(cls) if option.name not in ("share", "mode", "loss_weight")]

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], num_heads: int, head_dim: int, max_position: int) -> dict[str, Any]:
        """`options` with sizes in the proportions of DeepSeek-V3.2 and GLM-5, as far as they leave them open.

        With `share` none is: the sizes are those of the layer whose selection is read.

        Half as many index heads as the mixer has, but at least 16, of at most 128 dims; an eighth of the longest
        context is read, at most 2048 tokens.

        >>> IndexerConfig.fill_sizes({"topk": 64}, num_heads=128, head_dim=192, max_position=4096)
        {'topk': 64, 'num_heads': 64, 'head_dim': 128}
        """
        if options.get("share") is True:
            return dict(options)
        pool = size_of(options, "pool", 1)
        topk = max(1, min(2048, max_position // 8) // pool) * pool
        index_heads = 1 if options.get("form") == "dot" else max(16, num_heads // 2)
        return dict(options) | {key: value for key, value in {
            "num_heads": index_heads, "head_dim": min(128, head_dim), "topk": topk}.items()
            if key not in options}

    def num_params(self, context: LayerContext, query_dim: int) -> int:
        """Parameters of the indexer.

        Args:
            context: the layer.
            query_dim: width that index queries are projected from.
        """
        if self.share:
            return 0
        return self._projections(context, query_dim) + (2 + (self.pool or 0)) * self.head_dim

    def _projections(self, context: LayerContext, query_dim: int) -> int:
        keys = context.hidden_size * (1 if self.pool is None else 2)
        weights = context.hidden_size * self.num_heads if self.form == "relu" else 0
        return (query_dim * self.num_heads + keys) * self.head_dim + weights

    def _selects(self, context_length: int) -> bool:
        """A context of at most `topk` tokens needs no selection."""
        return self.mode == "sparse" and context_length > self.topk

    def read_keys(self, context_length: int) -> float:
        """Mean number of keys that attention reads."""
        if not self._selects(context_length):
            return count_visible_keys(context_length)
        if self.pool is None:
            return count_visible_keys(context_length, self.topk)
        return self.pool * count_visible_pools(context_length, self.pool, self.topk // self.pool) + count_open_tail(
            context_length, self.pool)

    def _scored(self, context_length: int, limit: int | None = None) -> float:
        """Mean number of index keys that a token is scored against, at most those of `limit` tokens."""
        if self.pool is None:
            return count_visible_keys(context_length, limit)
        return count_visible_pools(context_length, self.pool, None if limit is None else limit // self.pool)

    def flops_per_token(self, context: LayerContext, query_dim: int, context_length: int) -> float:
        """Forward FLOPs per token of the projections and the scores of a selection."""
        if self.share or not self._selects(context_length):
            return 0.0
        scores = self._scored(context_length) * self.num_heads * (self.head_dim + 1)
        return 2.0 * (self._projections(context, query_dim) + scores)

    def kl_flops_per_token(self, context: LayerContext, query_dim: int, context_length: int, width: int) -> float:
        """FLOPs per token that the loss adds to a training step besides the selection.

        These are the scores of the main attention, those of the index, forward and backward, and the gradients of the
        projections. The loss's inputs are detached, so that nothing goes back further.

        Args:
            context: the layer.
            query_dim: width that index queries are projected from.
            context_length: tokens of the sequence.
            width: heads times key dims of the main attention.
        """
        if self.loss_weight == 0:
            return 0.0
        selects = self._selects(context_length)
        scored = self._scored(context_length, self.topk if selects else None)
        flops = 2.0 * width * self.read_keys(context_length) + 6.0 * scored * self.num_heads * (self.head_dim + 1)
        projections = 0 if self.share else self._projections(context, query_dim)
        return flops + (2.0 if selects else 4.0) * projections

    def shard_traffic(self, tokens: int, context_length: int, dense: int, keys: int, read: int) -> list[ShardTraffic]:
        """Bytes that a training step of an indexed layer exchanges between shards of rows.

        Args:
            tokens: tokens of this process times bytes per element.
            context_length: tokens of a whole row. Up to `topk` of them are attended to densely.
            dense: bytes that dense attention exchanges.
            keys: elements per token that the loss of a dense layer reads.
            read: elements per token that sparse attention reads.
        """
        learns = self.loss_weight > 0
        index = 0 if self.share else tokens * self.head_dim * (1 if self.pool is None else 2)
        if self._selects(context_length):
            read *= tokens
            return [ShardTraffic("gather", index + read, index * learns + read)]
        found = [ShardTraffic("exchange", dense, dense)]
        return [*found, ShardTraffic("gather", index + tokens * keys, index)] if learns else found

    def state_bytes(self, context_length: int, element_bytes: int) -> int:
        if self.share or self.mode == "dense":
            return 0
        pools, open_tokens = divmod(context_length, self.pool or 1)
        return (pools + 2 * open_tokens) * self.head_dim * element_bytes


class Indexer(nn.Module):
    """Index queries, keys and head weights. `query_dim` is the width of what queries are made from."""

    def __init__(self, config: IndexerConfig, context: LayerContext, query_dim: int, rope: RopeConfig, rope_dim: int):
        super().__init__()
        self.config = config
        self.rope = rope
        self.topk = config.topk
        self.rope_dim = rope_dim if config.rope_dim is None else config.rope_dim
        width = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(query_dim, width, bias=False)
        self.k_proj = nn.Linear(context.hidden_size, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.weights_proj = None
        if config.form == "relu":
            self.weights_proj = nn.Linear(context.hidden_size, config.num_heads, bias=False)
        self.pool = None if config.pool is None else KeyPool(config.pool, context.hidden_size, config.head_dim)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, head_rows={"q_proj": self.config.num_heads})

    def keys(self, x_BTD: Tensor, seq: SequenceInfo, cache: IndexCache | None = None) -> Tensor:
        """Keys of tokens [B, S, I] or of complete pools [B, P, I], with those of the cache before them."""
        k_BTI = self.token_keys(x_BTD, seq)
        if self.pool is None:
            return seq.history(k_BTI) if cache is None else cache.append(k_BTI)  # type: ignore[call-arg]
        entries_BT2I = self.pool.entries(x_BTD, k_BTI)
        if isinstance(cache, EntryCache):
            return cache.append(entries_BT2I, self.pool)
        entries_BS2I = seq.history(entries_BT2I)
        return self.pool(self.pool.gather(entries_BS2I, self.pools(x_BTD, entries_BS2I.shape[1], seq)))

    def pools(self, queries_BT: Tensor, keys: int, seq: SequenceInfo) -> Pools:
        """Locate the pools of `keys` tokens per row, for queries at the last places of their rows."""
        assert self.pool is not None
        batch, queries = queries_BT.shape[:2]
        return Pools.of(batch, queries, keys, self.pool.size, queries_BT.device, seq.selection_borders)

    def token_keys(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """Index keys [B, T, I]: one head, normalised, rotated."""
        k_BTI = self.k_proj(x_BTD)
        normed = self.k_norm(k_BTI.to(torch.promote_types(k_BTI.dtype, torch.float32))).to(k_BTI.dtype)
        return rotate(normed[:, :, None], self.rope, self.rope_dim, seq, self.config.rope_kind)[:, :, 0]

    def queries(self, x_BTD: Tensor, query_input_BTQ: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Index queries [B, T, J, I] and head weights [B, T, J] in fp32, both scales inside the weights."""
        config = self.config
        q_BTJI = self.q_proj(query_input_BTQ).unflatten(-1, (config.num_heads, config.head_dim))
        q_BTJI = rotate(q_BTJI, self.rope, self.rope_dim, seq, config.rope_kind)
        if self.weights_proj is None:  # q . k = relu(q . k) - relu(-q . k)
            w_2 = torch.tensor([1.0, -1.0], dtype=torch.promote_types(x_BTD.dtype, torch.float32), device=x_BTD.device)
            w_BT2 = (w_2 * config.head_dim**-0.5).expand(*x_BTD.shape[:2], 2).contiguous()
            return torch.cat([q_BTJI, -q_BTJI], 2), w_BT2
        with torch.autocast(x_BTD.device.type, enabled=False):  # the selection is discontinuous: keep it exact
            w_BTJ = self.weights_proj(x_BTD.to(weight_dtype(self.weights_proj)))
        return q_BTJI, w_BTJ.to(torch.promote_types(w_BTJ.dtype, torch.float32)) * (
            config.head_dim * config.num_heads) ** -0.5

    @staticmethod
    def scores(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor) -> Tensor:
        """Compute scores I_ts [B, T, S] in the dtype of w, differentiable and without a mask.

        All of them are in memory at once, with B T J S dot products: pass few queries.
        """
        dots_BTJS = torch.einsum("btji,bsi->btjs", q_BTJI.to(w_BTJ.dtype), k_BSI.to(w_BTJ.dtype))
        return torch.einsum("btj,btjs->bts", w_BTJ, dots_BTJS.relu())

    def forward(self, x_BTD: Tensor, query_input_BTQ: Tensor, seq: SequenceInfo,
                cache: IndexCache | None = None) -> Tensor | None:
        """The selected keys of each token: int32 [B, T, k], positions in the row, padded with -1.

        None when every document fits into `topk`: then all keys are selected, and nothing is scored.
        """
        k_BSI = None if cache is None else self.keys(x_BTD, seq, cache)
        keys = x_BTD.shape[1] if cache is None else cache.length
        if longest_document(keys, seq) <= self.topk:
            return None
        k_BSI = self.keys(x_BTD, seq) if k_BSI is None else k_BSI
        q_BTJI, w_BTJ = self.queries(x_BTD, query_input_BTQ, seq)
        return self.choose((q_BTJI, k_BSI, w_BTJ), seq, keys)

    def tensors(self, x_BTD: Tensor, query_input_BTQ: Tensor, seq: SequenceInfo) -> IndexTensors:
        """Compute index queries, keys and head weights, with gradients to the indexer's parameters only."""
        x_BTD, query_input_BTQ = x_BTD.detach(), query_input_BTQ.detach()
        q_BTJI, w_BTJ = self.queries(x_BTD, query_input_BTQ, seq)
        return q_BTJI, self.keys(x_BTD, seq), w_BTJ

    def choose(self, index: IndexTensors, seq: SequenceInfo, keys: int) -> Tensor | None:
        """Select the `topk` best of `keys` tokens per row for each query; None when all of them fit into `topk`."""
        if longest_document(keys, seq) <= self.topk:
            return None
        keys = keys if seq.shard is None else seq.shard.history_length
        first = min(self.config.num_first, self.topk)
        local = min(self.config.num_local, self.topk - first)
        if self.pool is None:
            return indexer_topk(*index, self.topk, num_first=first, num_local=local, cu_seqlens=seq.selection_borders)
        size = self.pool.size
        return pooled_topk(*index, self.pools(index[0], keys, seq), self.topk // size,
                           num_first=first // size, num_local=local // size)

    def loss(self, index: IndexTensors, q_BTHK: Tensor, k_BSGK: Tensor, seq: SequenceInfo,
             **options: Any) -> IndexerKL:
        """Compute the KL of the main attention, with these queries and keys, against the index scores."""
        if self.pool is None:
            result = indexer_kl(*index, q_BTHK, k_BSGK, cu_seqlens=seq.selection_borders, **options)
            if seq.text_BT is None:  # every query sees a key
                return result
            counts_BT = torch.ones_like(seq.text_BT)
        else:
            pools = self.pools(q_BTHK, k_BSGK.shape[1], seq)
            result = pooled_indexer_kl(*index, q_BTHK, k_BSGK, pools, cu_seqlens=seq.selection_borders, **options)
            if seq.shard is None:
                return result
            counts_BT = pools.count_BT > 0  # in an early shard fewer queries see a pool
        count, text = counts_BT.sum(), seq.among_text(counts_BT).sum()  # padding is counted, with a value of 0
        loss, entropy = (seq.weighted_mean(x * count / text.clamp(min=1), text) for x in (result.loss, result.entropy))
        return result._replace(loss=loss, entropy=entropy)


def longest_document(keys: int, seq: SequenceInfo) -> int:
    """Tokens in the longest document of rows of `keys` tokens, those in the decode state included."""
    if seq.shard is not None:
        return seq.shard.longest_document
    if seq.cu_seqlens is None or torch.compiler.is_dynamo_compiling():
        return keys  # a compiled graph does not know the documents: it selects wherever a document may be so long
    return max(seq.cu_seqlens.lengths)
