"""Base of attention to compressed entries: makes or reads them, selects, and may be switched by a training stage.

B rows, T tokens, E entries, D hidden size, Q dims of the queries' latent, K dims of an entry, N selected entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybridlm.model.decode_state import EntryCache
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.entry_candidates import mark_candidates
from hybridlm.model.mixers.common.entry_indexer import EntryIndexer
from hybridlm.model.mixers.common.entry_sharing import (
    ENTRIES,
    ENTRY_SELECTION,
    INDEX_KEYS,
    SELECTION_READ,
    EntrySelection,
    EntrySharingConfig,
    SharedEntries,
    SharedIndexKeys,
)
from hybridlm.model.mixers.common.gated_entries import GatedEntries
from hybridlm.model.mixers.common.indexer import longest_document
from hybridlm.model.mixers.common.selector_loss import selector_trains
from hybridlm.model.mixers.contract import AttentionMode, SequenceMixer
from hybridlm.model.sequence import SequenceInfo


class EntrySelectingMixer(SequenceMixer):
    """Base of mixers that attend to entries: holds `entries` and `indexer`, where the layer has its own.

    `attention_mode` and `kl_weight` may be set at any time: attention to all entries or to the selected ones, and the
    weight of the indexer's loss. `measuring`: report the share of attention to all that is read, in evaluation too.
    """

    config: EntrySharingConfig

    def __init__(self, config: EntrySharingConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.layer_index = context.layer_index
        self.rotary_dim = 0 if config.rope.kind == "none" else config.rope_head_dim
        self.entries: GatedEntries | None = None
        self.indexer: EntryIndexer | None = None
        self.entry_source = self.selection_source = -1  # no layer
        self.candidates = None if config.indexer is None else config.indexer.candidates
        if config.share_entries:
            self.entry_source = context.source_of(config.entry_read)
            if config.has_own_indexer:
                self.candidates = context.shared_layout(config.key_read(context)).candidates
            elif config.indexer is not None:
                self.selection_source = context.source_of(SELECTION_READ)
        self.entries_are_read, self.keys_are_read = context.is_read(ENTRIES), context.is_read(INDEX_KEYS)
        self.selection_is_read = context.is_read(ENTRY_SELECTION)
        self.attention_mode: AttentionMode = "dense" if config.indexer is None else config.indexer.mode
        self.kl_weight = 0.0 if config.indexer is None else config.indexer.loss_weight
        self.measuring = False

    def build_entries(self, context: LayerContext, query_dim: int) -> None:
        """Add the submodules `entries` and `indexer`, last, where the layer has them."""
        config, form = self.config, self.config.entry_form
        if form is not None:
            self.entries = GatedEntries(context, form, config.rope, self.rotary_dim)
        if config.indexer is not None and config.has_own_indexer:
            self.indexer = EntryIndexer(config.indexer, context, query_dim, form, config.rope, self.rotary_dim)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"indexer_kl": self.kl_weight}

    def set_attention(self, mode: AttentionMode | None, loss_weights: Mapping[str, float]) -> None:
        if self.config.indexer is not None:
            self.attention_mode = mode or self.config.indexer.mode
            self.kl_weight = loss_weights.get("indexer_kl", self.config.indexer.loss_weight)

    def set_topk(self, topk: int | None) -> None:
        if self.indexer is not None:
            config = self.config if topk is None else self.config.with_topk(topk)
            assert config.indexer is not None
            self.indexer.topk = config.indexer.topk

    def selected_keys(self) -> int | None:
        if self.indexer is None or self.attention_mode == "dense":
            return None
        return self.indexer.topk * self.config.topk_multiple()

    def freeze_idle_parameters(self, later: Sequence[SequenceMixer] = ()) -> None:
        """Freeze an indexer that no loss trains, its own layer's or that of a layer which reads its list or keys."""
        if self.indexer is None:
            return
        readers = (mixer for mixer in later if isinstance(mixer, EntrySelectingMixer)
                   and self.layer_index in (mixer.entry_source, mixer.selection_source))
        if not any(mixer.kl_weight > 0 for mixer in (self, *readers)):
            self.indexer.requires_grad_(False)

    def measure_selection(self, on: bool) -> None:
        self.measuring = on and self.config.indexer is not None

    def made_entries(self, x_BTD: Tensor, seq: SequenceInfo, cache: EntryCache | None) -> tuple[SharedEntries,
                                                                                             Tensor | None]:
        """The entries that attention reads, and the index keys that are made of them or read with them.

        Args:
            x_BTD: input of the mixer.
            seq: positions and borders of the documents.
            cache: the entries of the decode state; None in training.

        Returns:
            The entries, made here or by the layer that they are shared with; index keys [B, E, I], None where there are
            none or they are pooled from tokens.
        """
        if self.entries is None:
            read: SharedEntries = seq.read(ENTRIES, self.entry_source)
            return read, None
        derive = None if self.indexer is None or self.indexer.k_proj is None else self.indexer.project_keys
        entries_BEK, windows, keys_BEI = self.entries(x_BTD, seq, cache, derive)
        made = SharedEntries(entries_BEK, windows)
        if self.entries_are_read:
            seq.leave(ENTRIES, self.layer_index, made)
        return made, keys_BEI

    def select(self, x_BTD: Tensor, latent_BTQ: Tensor, made: SharedEntries, keys_BEI: Tensor | None,
               seq: SequenceInfo, cache: EntryCache | None, *, decodes: bool) -> EntrySelection:
        """Choose entries, where they do not all fit into the top-k and something needs a choice.

        Index queries and keys are there where something is learned or measured.

        Args:
            x_BTD: input of the mixer.
            latent_BTQ: latent of its queries.
            made: the entries.
            keys_BEI: from `made_entries`.
            seq: positions and borders of the documents.
            cache: index keys of the decode state that are pooled from tokens; None in training.
            decodes: whether there is a decode state.
        """
        indexer, windows = self.indexer, made.windows
        if indexer is None:
            return self._shared_selection(seq)
        shared: SharedIndexKeys | None = None
        if self.entry_source >= 0:
            shared = seq.read(INDEX_KEYS, self.entry_source)
            keys_BEI = shared.keys_BEI
        trains = selector_trains(self, indexer, self.kl_weight)
        learns, sparse = not decodes and (trains or self.measuring), self.attention_mode == "sparse"
        longest = longest_document(windows.first_BS.shape[1], seq) // windows.length
        fits = longest <= indexer.topk
        index = chosen = None
        if learns or self.keys_are_read or (sparse and (decodes or not fits)):
            # Layers that score these index keys may learn where this one does not.
            with torch.set_grad_enabled(trains or (self.keys_are_read and torch.is_grad_enabled())):
                keys = None if keys_BEI is None else (keys_BEI, windows)
                index = indexer(x_BTD.detach(), latent_BTQ.detach(), seq, cache, keys)
            if not fits and shared is not None and self.candidates is not None:
                chosen = indexer.choose(index, shared.candidates_BTC, self.candidates.block)
            elif not fits:
                chosen = indexer.choose(index)
            if self.keys_are_read:
                wanted = self.candidates if sparse else None
                marked = (None if wanted is None or longest <= wanted.entries
                          else mark_candidates(indexer, index, wanted))
                seq.leave(INDEX_KEYS, self.layer_index, SharedIndexKeys(index.entries_BE, marked))
        selection = EntrySelection(chosen, indexer, index if learns else None)
        if self.selection_is_read:
            seq.leave(ENTRY_SELECTION, self.layer_index, selection)
        return selection

    def _shared_selection(self, seq: SequenceInfo) -> EntrySelection:
        """The selection of the layer whose list is shared; without one everything is read."""
        if self.selection_source < 0:
            return EntrySelection()
        read: EntrySelection = seq.read(ENTRY_SELECTION, self.selection_source)
        assert read.indexer is not None
        wanted = self.measuring or selector_trains(self, read.indexer, self.kl_weight)
        return read if wanted else replace(read, index=None)
