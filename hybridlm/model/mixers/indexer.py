"""The lightning indexer of DeepSeek sparse attention: picks, for each token, the few keys that attention will read.

    I_ts = sum_j w_tj relu(q_tj . k_s) * Di^-0.5 * Hi^-0.5,   attention reads the `topk` keys s of highest I_ts

Source: DeepSeek-V3.2 (section 2.1); sharing over layers: GLM-5.
B rows, T tokens, S keys, D hidden size, J index heads (Hi), I index head dim (Di), k selected keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.model.cache import TokenCache
from hybridlm.model.config import LayerContext, require
from hybridlm.model.mixers.base import SequenceMixer
from hybridlm.model.mixers.cost import visible_keys
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import indexer_topk

AttentionMode = Literal["dense", "sparse"]


@dataclass(kw_only=True)
class IndexerConfig:
    """Indexer of an `attention` or `mla` mixer.

    `rope_kind` rotates the first `rope_dim` dims of index queries and keys with theta and scaling of the mixer's own
    RoPE; `rope_dim` null takes `qk_rope_head_dim` (mla) or the rotated share of `head_dim` (attention).
    `share`: this layer has no indexer of its own and reads the keys that the nearest earlier indexed layer selected.
    `mode` is what `mixer.attention_mode` starts as: `dense` keeps the parameters and attends to everything (warm-up).
    """

    num_heads: int = 64
    head_dim: int = 128
    topk: int = 2048
    rope_kind: Literal["half", "interleaved", "none"] = "half"
    rope_dim: int | None = None
    norm_eps: float = 1e-6
    share: bool = False
    mode: AttentionMode = "sparse"

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "topk", "norm_eps"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    def check_rope(self, mixer_dim: int) -> None:
        """Raise ConfigError unless the index heads can be rotated in a mixer that rotates `mixer_dim` dims."""
        dim = mixer_dim if self.rope_dim is None else self.rope_dim
        require(self.share or self.rope_kind == "none" or (0 < dim <= self.head_dim and dim % 2 == 0),
                "indexer.rope_dim", "does not fit the index heads", got=dim,
                expected=f"an even number up to head_dim ({self.head_dim})",
                hint="rope_kind=none turns the rotation off")

    def num_params(self, context: LayerContext, query_dim: int) -> int:
        if self.share:
            return 0
        width = query_dim * self.num_heads + context.hidden_size + 2
        return width * self.head_dim + context.hidden_size * self.num_heads

    def flops_per_token(self, context: LayerContext, query_dim: int, context_length: int) -> float:
        """Projections and scores. A context of at most `topk` tokens needs no selection."""
        if self.share or self.mode == "dense" or context_length <= self.topk:
            return 0.0
        projections = (query_dim * self.num_heads + context.hidden_size) * self.head_dim
        projections += context.hidden_size * self.num_heads
        return 2.0 * (projections + visible_keys(context_length) * self.num_heads * (self.head_dim + 1))

    def state_bytes(self, context_length: int, element_bytes: int) -> int:
        unused = self.share or self.mode == "dense"
        return 0 if unused else context_length * self.head_dim * element_bytes


class Indexer(nn.Module):
    """Index queries, keys and head weights. `query_dim` is the width of what queries are made from."""

    def __init__(self, config: IndexerConfig, context: LayerContext, query_dim: int, rope: RopeConfig, rope_dim: int):
        super().__init__()
        self.config, self.rope = config, rope
        self.rope_dim = rope_dim if config.rope_dim is None else config.rope_dim
        width = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(query_dim, width, bias=False)
        self.k_proj = nn.Linear(context.hidden_size, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.weights_proj = nn.Linear(context.hidden_size, config.num_heads, bias=False)

    def keys(self, x_BTD: Tensor, seq: SequenceInfo) -> Tensor:
        """Index keys [B, T, I]: one head, normalised, rotated."""
        k_BTI = self.k_proj(x_BTD)
        norm = self.k_norm
        normed = F.layer_norm(k_BTI.float() if k_BTI.dtype in (torch.bfloat16, torch.float16) else k_BTI,
                              norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(k_BTI.dtype)
        return rotate(normed[:, :, None], self.rope, self.rope_dim, seq, self.config.rope_kind)[:, :, 0]

    def queries(self, x_BTD: Tensor, query_input_BTQ: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Index queries [B, T, J, I] and head weights [B, T, J] in fp32, both scales inside the weights."""
        config = self.config
        q_BTJI = self.q_proj(query_input_BTQ).unflatten(-1, (config.num_heads, config.head_dim))
        q_BTJI = rotate(q_BTJI, self.rope, self.rope_dim, seq, config.rope_kind)
        weight = self.weights_proj.weight
        with torch.autocast(x_BTD.device.type, enabled=False):  # the selection is discontinuous: keep it exact
            w_BTJ = F.linear(x_BTD.to(weight.dtype), weight)
        return q_BTJI, w_BTJ.to(torch.promote_types(w_BTJ.dtype, torch.float32)) * (
            config.head_dim * config.num_heads) ** -0.5

    @staticmethod
    def scores(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor) -> Tensor:
        """I_ts, [B, T, S] in the dtype of w, differentiable, without a mask. Pass few queries: all are in memory."""
        dots_BTJS = torch.einsum("btji,bsi->btjs", q_BTJI.to(w_BTJ.dtype), k_BSI.to(w_BTJ.dtype))
        return torch.einsum("btj,btjs->bts", w_BTJ, dots_BTJS.relu())

    def forward(self, x_BTD: Tensor, query_input_BTQ: Tensor, seq: SequenceInfo,
                cache: TokenCache | None = None) -> Tensor | None:
        """The selected keys of each token: int32 [B, T, k], positions in the row, padded with -1.

        None when every document fits into `topk`: then all keys are selected, and nothing is scored.
        """
        k_BSI = None
        if cache is not None:
            k_BSI = cache.append(self.keys(x_BTD, seq))
        if longest_document(x_BTD, seq, 0 if k_BSI is None else k_BSI.shape[1]) <= self.config.topk:
            return None
        k_BSI = self.keys(x_BTD, seq) if k_BSI is None else k_BSI
        q_BTJI, w_BTJ = self.queries(x_BTD, query_input_BTQ, seq)
        return indexer_topk(q_BTJI, k_BSI, w_BTJ, self.config.topk, cu_seqlens=seq.cu_seqlens)


def longest_document(x_BTD: Tensor, seq: SequenceInfo, cached: int) -> int:
    """Tokens in the longest document of the batch, those in the decode state included; known on the host."""
    if seq.cu_seqlens is not None:
        return max(seq.cu_seqlens.lengths)
    return max(cached, x_BTD.shape[1])


class Selections:
    """What indexed layers selected in this forward, for layers that share; kept in `seq.shared`.

    By layer and not as one "latest" entry, because activation checkpointing runs layers again from the last to the
    first. An entry that no layer had read when the next one came is dropped.
    """

    KEY = "indexer.selections"

    def __init__(self) -> None:
        self.by_layer: dict[int, Tensor | None] = {}
        self.read: set[int] = set()

    @classmethod
    def of(cls, seq: SequenceInfo) -> Selections:
        return seq.shared.setdefault(cls.KEY, cls())

    def leave(self, layer: int, indices_BTk: Tensor | None) -> None:
        for earlier in [i for i in self.by_layer if i < layer and i not in self.read]:
            del self.by_layer[earlier]
        self.by_layer[layer] = indices_BTk

    def nearest(self, layer: int) -> Tensor | None:
        """The selection of the nearest earlier indexed layer; None stands for all keys."""
        source = max((i for i in self.by_layer if i < layer), default=None)
        if source is None:
            raise ConfigError("indexer.share", f"layer {layer} has no earlier selection to share", got=True,
                              expected="an indexed layer with share=false before it")
        self.read.add(source)
        return self.by_layer[source]


class IndexedMixer(SequenceMixer):
    """Base of mixers with the option `indexer`: holds the indexer and the mode that a training stage may switch."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("k_norm.weight", "k_norm.bias", "weights_proj.weight")

    def __init__(self, config: IndexerConfig | None, context: LayerContext):
        super().__init__()
        self.indexer_config, self.layer_index = config, context.layer_index
        self._attention_mode: AttentionMode = "dense" if config is None else config.mode

    def build_indexer(self, context: LayerContext, query_dim: int, rope: RopeConfig, rope_dim: int) -> None:
        """Add the `indexer` submodule (last, so that a dense mixer's parameters keep their order)."""
        config = self.indexer_config
        self.indexer = None
        if config is not None and not config.share:
            self.indexer = Indexer(config, context, query_dim, rope, rope_dim)

    @property
    def attention_mode(self) -> AttentionMode:
        """`sparse`: read the selected keys. `dense`: read all keys, as without an indexer. May be set at any time."""
        return self._attention_mode

    @attention_mode.setter
    def attention_mode(self, mode: AttentionMode) -> None:
        require(mode in ("dense", "sparse"), "attention_mode", "is unknown", got=mode, expected="dense or sparse")
        require(mode == "dense" or self.indexer_config is not None, "attention_mode", "needs an indexer", got=mode,
                expected="dense", hint="give the mixer an `indexer` section")
        self._attention_mode = mode

    def select(self, x_BTD: Tensor, query_input_BTQ: Tensor, seq: SequenceInfo,
               cache: TokenCache | None) -> Tensor | None:
        """The keys that attention may read [B, T, k], or None for all. No gradient passes."""
        if self.indexer_config is None:
            return None
        if self._attention_mode == "dense":
            indices = None
        elif self.indexer is None:
            return Selections.of(seq).nearest(self.layer_index)
        else:
            with torch.no_grad():
                indices = self.indexer(x_BTD, query_input_BTQ, seq, cache)
        if not self.indexer_config.share:
            Selections.of(seq).leave(self.layer_index, indices)
        return indices
