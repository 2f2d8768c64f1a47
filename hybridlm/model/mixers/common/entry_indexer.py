"""The lightning indexer over compressed entries: picks, for each token, the entries that attention reads.

    I_te = sum_j w_tj relu(q_tj . k_e) * Di^-0.5 * Hi^-0.5,   attention reads the `topk` entries e of highest I_te

q_t comes from the latent of the queries. k_e are entries of its own, pooled as those of attention but narrower
(DeepSeek-V4), or rope(norm(W e)) of attention's entries e before their rotation (DeepSeek-V4.1), its own layer's or
those of an earlier one.

Sources: DeepSeek-V4, 2026, section 2.3.1; DeepSeek-V4.1, 2026. Its training is that of DeepSeek-V3.2 (section 2.1),
with entries for keys.
B rows, T tokens, Q queries of a piece, E entries, D hidden size, J index heads (Hi), I index head dim (Di), K dims of
an entry, N selected entries, C candidate blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import EntryCache
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.block_selection import BlockBudget, BlockIndex, choose_blocks
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.entry_candidates import AmongCandidates
from hybridlm.model.mixers.common.entry_indexer_config import EntryIndexerConfig
from hybridlm.model.mixers.common.gated_entries import EntryForm, GatedEntries
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.readable_weights import weight_dtype
from hybridlm.model.rope import RopeConfig, rotate_last
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


class EntryIndexer(nn.Module):
    """The module: q_proj [J I, Q], weights_proj [J, D] and, where its layer makes the entries, what makes index keys.

    These are `entries`, a `GatedEntries`, or k_proj [I, K] and k_norm.

    Args:
        config: its options.
        context: the layer.
        query_dim: width of the queries' latent Q.
        form: of the layer's entries; None where index keys are those of an earlier layer.
        rope: rotary embedding of index queries and keys.
        rotary_dim: how many of their last dims it rotates.
    """

    lists = 1

    def __init__(self, config: EntryIndexerConfig, context: LayerContext, query_dim: int, form: EntryForm | None,
                 rope: RopeConfig, rotary_dim: int):
        super().__init__()
        self.config, self.rope, self.rotary_dim = config, rope, rotary_dim
        self.topk = config.topk
        self.scores_per_entry = config.num_heads
        self.q_proj = nn.Linear(query_dim, config.num_heads * config.head_dim, bias=False)
        self.weights_proj = nn.Linear(context.hidden_size, config.num_heads, bias=False)
        self.entries: GatedEntries | None = None
        self.k_proj: nn.Linear | None = None
        if form is not None and config.key_input == "tokens":
            self.entries = GatedEntries(context, form.of_dim(config.head_dim), rope, rotary_dim)
        elif form is not None:
            self.k_proj = nn.Linear(form.dim, config.head_dim, bias=False)
            self.k_norm = RMSNorm.of(context.norm, config.head_dim)

    @property
    def budget(self) -> BlockBudget:
        """Number of entries that are read; none is read without being chosen."""
        return BlockBudget(self.topk, first=0, local=0)

    def project_keys(self, plain_BEK: Tensor, place_BE: Tensor) -> Tensor:
        """Index keys [B, E, I] of entries before their rotation; the entries get no gradient.

        Args:
            plain_BEK: the entries.
            place_BE: positions of the first tokens of their windows.
        """
        assert self.k_proj is not None
        keys_BEI = self.k_norm(self.k_proj(plain_BEK.detach()))
        return rotate_last(keys_BEI[:, :, None], self.rope, self.rotary_dim, SequenceInfo(place_BE))[:, :, 0]

    def forward(self, x_BTD: Tensor, latent_BTQ: Tensor, seq: SequenceInfo, cache: EntryCache | None,
                keys: tuple[Tensor, EntryWindows] | None = None) -> BlockIndex:
        """Index queries [B, T, J, I + 1], the last number being the weight of the head, and keys [B, E, I].

        Args:
            x_BTD: input of the mixer.
            latent_BTQ: latent of its queries.
            seq: positions and borders of the documents.
            cache: index keys that are pooled from tokens, of the decode state; None in training.
            keys: index keys that are made already, and their windows; None where they are pooled from tokens.
        """
        config = self.config
        q_BTJI = self.q_proj(latent_BTQ).unflatten(-1, (config.num_heads, config.head_dim))
        q_BTJI = wide(rotate_last(q_BTJI, self.rope, self.rotary_dim, seq))
        with torch.autocast(x_BTD.device.type, enabled=False):  # the selection is discontinuous: keep it exact
            w_BTJ = self.weights_proj(x_BTD.to(weight_dtype(self.weights_proj)))
        w_BTJ = w_BTJ.to(q_BTJI.dtype) * (config.head_dim * config.num_heads) ** -0.5
        if keys is None:
            assert self.entries is not None
            keys = self.entries(x_BTD, seq, cache)[:2]
        keys_BEI, windows = keys
        return BlockIndex(torch.cat([q_BTJI, w_BTJ[..., None]], -1), keys_BEI, windows, windows)

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        """Scores [B, Q, 1, E] of all entries for the queries `rows`."""
        q_BQJI, w_BQJ1 = index.queries_BT[:, rows].split([self.config.head_dim, 1], -1)
        dots_BQJE = torch.einsum("bqji,bei->bqje", q_BQJI, wide(index.entries_BE)).relu()
        return (w_BQJ1 * dots_BQJE).sum(2, keepdim=True)

    def choose(self, index: BlockIndex, candidates_BTC: Tensor | None = None, block: int = 1) -> Tensor:
        """Numbers of the chosen entries in the query's document, int64 [B, T, 1, N], ascending, -1 for none.

        Args:
            index: from `forward`.
            candidates_BTC: numbers of the blocks of entries that alone may be chosen; None: all.
            block: entries of such a block.
        """
        scorer = self if candidates_BTC is None else AmongCandidates(self, candidates_BTC, block)
        return choose_blocks(scorer, index, self.budget)[..., :-1]  # the last one is the window that is still open

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, head_rows={"q_proj": self.config.num_heads})
