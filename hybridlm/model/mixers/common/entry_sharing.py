"""Compressed entries, index keys and selections that later layers read: what layers leave, and what fits what.

A layer leaves its entries (`ENTRIES`), the keys by which indexers score them (`INDEX_KEYS`) and the entries that its
indexer selects (`ENTRY_SELECTION`). A later one reads the entries in place of own ones, and either scores their index
keys by queries of its own or reads a selection too. In DeepSeek-V4.1 (CSA2) the three are called Full, Reindex and
Reuse.

Source: DeepSeek-V4.1-Flash, 2026 (arXiv 2609.19969, from summaries), and its published inference code as others
describe it.
B rows, T tokens, E entries, K dims of an entry, I dims of an index key, N selected entries, C candidate blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.block_selection import BlockIndex
from hybridlm.model.mixers.common.cost import count_visible_pools
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.entry_indexer import EntryIndexer
from hybridlm.model.mixers.common.entry_indexer_config import EntryIndexerConfig
from hybridlm.model.mixers.common.gated_entries import EntryForm
from hybridlm.model.mixers.contract import AttentionMode, MixerConfig
from hybridlm.model.rope import RopeConfig
from hybridlm.model.sharing import SharedKind, SharedRead

ENTRIES = SharedKind("compressed entries", gradient=True)  # `SharedEntries`
INDEX_KEYS = SharedKind("index keys of entries", gradient=True)  # `SharedIndexKeys`; the losses of readers train them
# `EntrySelection`; the loss of an indexer reaches it from every layer that reads what it selects.
ENTRY_SELECTION = SharedKind("the entries that an indexer selects", gradient=True)
SELECTION_READ = SharedRead(ENTRY_SELECTION, option="indexer.share")


@dataclass(frozen=True)
class SharedEntries:
    """Entries of all tokens up to the last query.

    Args:
        entries_BEK: rotated, keys and values of attention.
        windows: the windows of tokens that they stand for.
    """

    entries_BEK: Tensor
    windows: EntryWindows


@dataclass(frozen=True)
class SharedIndexKeys:
    """The keys by which indexers score entries.

    Args:
        keys_BEI: one per entry.
        candidates_BTC: numbers of the blocks of entries that readers may select from, ascending, -1 for none; None:
            all.
    """

    keys_BEI: Tensor
    candidates_BTC: Tensor | None = None


@dataclass(frozen=True)
class EntrySelection:
    """The entries that attention reads, and what the loss of the indexer needs.

    Args:
        chosen_BT1N: numbers of the chosen entries in the query's document, -1 for none; None: all.
        indexer: the indexer that chose; None without one.
        index: its queries and keys; None where nothing is learned or measured.
    """

    chosen_BT1N: Tensor | None = None
    indexer: EntryIndexer | None = None
    index: BlockIndex | None = None


@dataclass(frozen=True)
class EntryLayout:
    """Facts about entries that a layer which reads them has to know.

    Args:
        ratio: tokens that an entry stands for.
        head_dim: dims of an entry K.
        rope: how entries are rotated.
        rope_head_dim: how many of their last dims are.
    """

    ratio: int
    head_dim: int
    rope: RopeConfig
    rope_head_dim: int


@dataclass(frozen=True)
class SelectionLayout:
    """Facts about a selection: the indexer that selects, and the layer whose entries it selects from."""

    indexer: EntryIndexerConfig
    entries_of: int


class EntrySharingConfig(MixerConfig):
    """Base of a config whose layers make compressed entries or read those of an earlier layer.

    The attributes below are fields of the kind.
    """

    ratio: int | None
    overlap: bool
    position_bias: bool
    q_lora_rank: int
    head_dim: int
    rope: RopeConfig
    rope_head_dim: int
    share_entries: bool
    source: int | str | None
    indexer: EntryIndexerConfig | None

    def check_sharing(self) -> None:
        """Raise ConfigError where the options of sharing contradict each other."""
        require(self.share_entries or self.source is None, "source", "names a layer whose entries are read",
                got=self.source, expected="null, or share_entries=true")
        if self.indexer is not None:
            require(self.share_entries or not self.indexer.share, "indexer.share", "needs the entries of that layer",
                    got="share_entries=false", expected="share_entries=true")
            require(not self.share_entries or self.indexer.candidates is None, "indexer.candidates",
                    "are marked by the layer that makes the entries", got="share_entries=true", expected="null here")

    @classmethod
    def idle_options(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        if options.get("share_entries") is not True:
            return {}
        idle = dict.fromkeys(["overlap", "position_bias"], "share_entries=true")
        indexer = options.get("indexer")
        if not isinstance(indexer, Mapping) or indexer.get("share") is True:
            idle["ratio"] = "share_entries=true"  # an indexer of the layer itself needs it
        if not isinstance(indexer, Mapping):
            return idle
        if indexer.get("share") is True:
            shared = dict.fromkeys(["num_heads", "head_dim", "topk", "key_input"], "indexer.share=true")
        else:
            shared = {"key_input": "share_entries=true"}
        return idle | {f"indexer.{key}": cause for key, cause in shared.items()}

    @property
    def has_entries(self) -> bool:
        """Whether attention reads entries, own or those of an earlier layer."""
        return self.share_entries or self.ratio is not None

    @property
    def entry_read(self) -> SharedRead:
        """The entries that the layer reads where it shares them."""
        return SharedRead(ENTRIES, self.source, "share_entries" if self.source is None else "source")

    @property
    def entry_form(self) -> EntryForm | None:
        """Sizes of the entries that the layer makes; None where it makes none."""
        if self.ratio is None or self.share_entries:
            return None
        return EntryForm(self.head_dim, self.ratio, self.overlap, self.position_bias)

    @property
    def has_own_indexer(self) -> bool:
        """Whether the layer selects entries by itself."""
        return self.indexer is not None and not self.indexer.share

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        left = [] if self.entry_form is None else [ENTRIES]
        if not self.has_own_indexer:
            return left
        return (*left, ENTRY_SELECTION) if self.share_entries else (*left, INDEX_KEYS, ENTRY_SELECTION)

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        if not self.share_entries:
            return ()
        if self.has_own_indexer:
            return self.entry_read, self.key_read(context)
        return (self.entry_read,) if self.indexer is None else (self.entry_read, SELECTION_READ)

    def key_read(self, context: LayerContext) -> SharedRead:
        """The index keys of the entries that the layer reads."""
        return SharedRead(INDEX_KEYS, context.source_of(self.entry_read), "indexer")

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any:
        if kind == ENTRIES:
            assert self.ratio is not None
            return EntryLayout(self.ratio, self.head_dim, self.rope, self.rope_head_dim)
        if kind == INDEX_KEYS:
            return self.indexer
        if kind == ENTRY_SELECTION:
            assert self.indexer is not None
            return SelectionLayout(self.indexer, self._entries_of(context))
        return super().shared_layout(kind, context)

    def _entries_of(self, context: LayerContext) -> int:
        """Index of the layer whose entries this one attends to."""
        return context.source_of(self.entry_read) if self.share_entries else context.layer_index

    def entry_ratio(self, context: LayerContext) -> int | None:
        """Tokens that an entry stands for; None without entries."""
        if not self.share_entries:
            return self.ratio
        layout: EntryLayout = context.shared_layout(self.entry_read)
        return layout.ratio

    def reading_indexer(self, context: LayerContext) -> EntryIndexerConfig | None:
        """The indexer with the sizes that hold in the layer: those of the layer whose list it reads, or its own."""
        own = self.indexer
        if own is None or not own.share:
            return own
        layout: SelectionLayout = context.shared_layout(SELECTION_READ)
        return replace(layout.indexer, share=True, mode=own.mode, loss_weight=own.loss_weight, candidates=None)

    def check_sources(self, context: LayerContext) -> None:
        if not self.share_entries:
            return
        layer = self._entries_of(context)
        layout: EntryLayout = context.shared_layout(self.entry_read)
        reads = f"reads entries of another form, those of layer {layer}"
        require(self.head_dim == layout.head_dim, "head_dim", reads, got=self.head_dim,
                expected=str(layout.head_dim))
        require(self.rope_head_dim == layout.rope_head_dim or self.rope.kind == "none", "rope_head_dim", reads,
                got=self.rope_head_dim, expected=str(layout.rope_head_dim))
        self.rope.check_same(layout.rope, reads)
        if self.indexer is not None:
            self._check_indexer(self.indexer, layer, layout, context)

    def _check_indexer(self, own: EntryIndexerConfig, layer: int, layout: EntryLayout, context: LayerContext) -> None:
        if own.share:
            chosen: SelectionLayout = context.shared_layout(SELECTION_READ)
            chooser = context.source_of(SELECTION_READ)
            require(chosen.entries_of == layer, "indexer.share", f"reads the selection of layer {chooser}, which is of "
                    "other entries", got=f"entries of layer {chosen.entries_of}", expected=f"entries of layer {layer}")
            require(own.mode == "dense" or chosen.indexer.mode == "sparse", "indexer.mode", f"shares the selection of "
                    f"layer {chooser}, which reads all entries and selects none", got=own.mode,
                    expected="dense, or sparse in both layers")
            return
        source: EntryIndexerConfig = context.shared_layout(self.key_read(context))
        require(self.ratio == layout.ratio, "ratio", f"selects among entries of layer {layer}",
                got="null" if self.ratio is None else self.ratio, expected=str(layout.ratio))
        require(own.head_dim == source.head_dim, "indexer.head_dim", f"scores the index keys of layer {layer}",
                got=own.head_dim, expected=str(source.head_dim))
        candidates = source.candidates
        require(candidates is None or own.topk <= candidates.entries, "indexer.topk", "selects among the candidates of "
                f"layer {layer}", got=own.topk, expected=f"at most {candidates and candidates.entries}")

    # Costs

    def selects(self, context: LayerContext, context_length: int) -> bool:
        """Whether a context of this length has more entries than a token reads."""
        ratio, indexer = self.entry_ratio(context), self.reading_indexer(context)
        return (ratio is not None and indexer is not None and indexer.mode == "sparse"
                and context_length // ratio > indexer.topk)

    def seen_entries(self, context: LayerContext, context_length: int) -> float:
        """Mean number of complete entries that a token sees."""
        ratio = self.entry_ratio(context)
        return 0.0 if ratio is None else count_visible_pools(context_length, ratio)

    def index_weights(self, context: LayerContext) -> int:
        """Number of weights of the projections of the layer's own indexer."""
        assert self.indexer is not None
        return (self.indexer.query_weights(context.hidden_size, self.q_lora_rank)
                + self.indexer.key_weights(context.hidden_size, self.entry_form))

    # Selection

    def has_selector(self) -> bool:
        return self.indexer is not None

    def topk_multiple(self) -> int:
        return 1 if self.indexer is None or self.indexer.share else self.ratio or 1

    def with_topk(self, topk: int) -> Self:
        if self.indexer is None or self.indexer.share:
            return self
        return self._with_indexer_options(topk=topk // self.topk_multiple())

    def own_losses(self) -> tuple[str, ...]:
        return () if self.indexer is None else self.loss_names

    def selector_parameters(self) -> tuple[str, ...]:
        return () if self.indexer is None or self.indexer.share else ("indexer.*",)

    def with_attention_mode(self, mode: AttentionMode) -> Self:
        return self._with_indexer_options(mode=mode)

    def _with_indexer_options(self, **options: Any) -> Self:
        if self.indexer is None:
            return self
        return replace(self, indexer=replace(self.indexer, **options))  # type: ignore[call-arg]
