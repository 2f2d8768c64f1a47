"""Per-layer embeddings (PLE): a table of token ids of this layer's own, gated by the stream and added to it.

    e = sqrt(P) E[id],   c = norm(W_c h_0 / sqrt(D)),   p = (e + c) / sqrt(2)
    y = W_o (gelu(W_g h) * p)

h_0 is the embedding before the first layer. The branch stands alone in a layer behind each layer of the model, with
`residual: {form: post}`: it reads the stream h as it is, and h becomes h + norm(y).

Sources: Gemma 3n (Google 2025) and Gemma 4 (Google 2026), as in the classes Gemma3nTextModel and Gemma4TextModel of
transformers, where the tables of all layers are columns of one and the weight of the inner norm is shared by them.

B rows, T tokens, D hidden size, P width of the table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import NoState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.contract import Aux, MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.token_table import LookupTable, look_up, token_ids

DEFAULT_SHARE = 8  # hidden size over the width of a table that leaves it open, as in Gemma 3n and 4


@dataclass(kw_only=True)
class PerLayerEmbeddingConfig(MixerConfig):
    """Configuration of per-layer embeddings.

    Args:
        embed_dim: width P of the table; Gemma has 256 at hidden sizes of 1536 to 2560.
        norm_eps: of the inner norm; null takes the model's.

    Raises:
        ConfigError: a width that is not positive.
    """

    kind: str = "per_layer_embedding"
    residual: BranchConfig = field(default_factory=lambda: BranchConfig(form="post"))
    embed_dim: int
    norm_eps: float | None = None
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.embed_dim > 0, "embed_dim", "must be positive", got=self.embed_dim)
        require(self.norm_eps is None or self.norm_eps > 0, "norm_eps", "must be positive", got=self.norm_eps)

    def num_params(self, context: LayerContext) -> int:
        return self.lookup_params(context) + self.embed_dim * (3 * context.hidden_size + 1)

    def lookup_params(self, context: LayerContext) -> int:
        return context.vocab_size * self.embed_dim

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        return {"projections": 6.0 * context.hidden_size * self.embed_dim}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Nothing: a token reads itself alone."""
        return 0

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the context around its norm, p, the gate, and their product."""
        return 6.0 * element_bytes * self.embed_dim

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: a token reads itself alone."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return []

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        return {"embed_dim": max(1, model.hidden_size // DEFAULT_SHARE)}


@register_mixer("per_layer_embedding", PerLayerEmbeddingConfig)
class PerLayerEmbedding(SequenceMixer):
    """Parameters: table [V, P], context_proj [P, D], context_norm [P], gate_proj [P, D], o_proj [D, P]."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("context_norm.weight",)

    def __init__(self, config: PerLayerEmbeddingConfig, context: LayerContext):
        super().__init__()
        D, P = context.hidden_size, config.embed_dim
        self.table = LookupTable(context.vocab_size, P)
        self.context_proj = nn.Linear(D, P, bias=False)
        self.context_norm = RMSNorm.of(context.norm, P, config.norm_eps)
        self.gate_proj = nn.Linear(D, P, bias=False)
        self.o_proj = nn.Linear(P, D, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: NoState | None = None) -> tuple[Tensor, Aux]:
        ids_BT = token_ids(seq, "a per-layer embedding")
        if seq.embedding_BTD is None:
            raise ValueError("a per-layer embedding reads the embedding of the tokens: run it in a model, or set "
                             "seq.embedding_BTD")
        D, P = self.o_proj.weight.shape
        identity_BTP = P**0.5 * look_up(self.table, ids_BT, x_BTD.device)
        context_BTP = self.context_norm(self.context_proj(seq.embedding_BTD) * D**-0.5)
        mixed_BTP = (identity_BTP + context_BTP) * 2**-0.5
        gate_BTP = F.gelu(self.gate_proj(x_BTD), approximate="tanh")
        return self.o_proj((gate_BTP * mixed_BTP).to(gate_BTP.dtype)), {}

    @property
    def decodes_padded_rows(self) -> bool:
        return True

    def new_state(self, batch: int, max_length: int) -> NoState:
        return NoState()

    def init_weights(self, std: float) -> None:
        """Projections and the table are normal(0, std), as in transformers."""
        init_projections(self, std)
        nn.init.normal_(self.table.weight, std=std)
