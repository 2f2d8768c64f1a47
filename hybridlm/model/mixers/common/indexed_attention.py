"""Base of softmax attention with the option `indexer`: the selection, also shared between layers, and its loss.

B rows, T tokens, S keys, D hidden size, H/G query/key heads, K/V key/value head dim, Q width of what index queries are
made from, k selected keys.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.mixers.common.dense_attention import dense_attention
from hybridlm.model.mixers.common.indexer import IndexCache, Indexer, IndexerConfig, IndexTensors
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.selector_loss import selector_trains
from hybridlm.model.mixers.contract import AttentionMode, Aux, MixerConfig, SequenceMixer
from hybridlm.model.mixers.sizing import ModelSizes, size_of
from hybridlm.model.rope import RopeConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind, SharedRead
from hybridlm_kernels import CuSeqlens, attention_recall, sparse_attention
from hybridlm_kernels.ops.indexer_kl import Recall


@dataclass(frozen=True)
class Selection:
    """The keys that attention reads, and the tensors that the indexer's loss needs.

    Attributes:
        indices: the keys that each token reads, int32 [B, T, k] with -1 for none; None: all keys.
        chosen: the keys that the indexer selects, also where attention reads all; None: all keys.
        indexer: the indexer that selected; None without one.
        index: its queries, keys and head weights; None where nothing is learned or measured.
    """

    indices: Tensor | None = None
    chosen: Tensor | None = None
    indexer: Indexer | None = None
    index: IndexTensors | None = None


@dataclass(frozen=True)
class ObservedSelection:
    """The attention of a layer and the keys that its indexer selects, where selections are measured.

    Args:
        layer: index of the layer.
        q_BTHK: queries of the attention.
        k_BSGK: its keys, of the whole rows.
        chosen_BTN: the selected keys of each query, int [B, T, N], positions in the row or -1 for none.
        borders: borders of the documents; None where each row is one.
        scale: factor of the scores.
    """

    layer: int
    q_BTHK: Tensor
    k_BSGK: Tensor
    chosen_BTN: Tensor
    borders: CuSeqlens | None
    scale: float


# The loss of an indexer reaches it from every layer that reads its selection, so gradients pass.
SELECTION = SharedKind("the keys that an indexer selects", gradient=True)
SHARED_SELECTION = SharedRead(SELECTION, option="indexer.share")


class IndexedMixerConfig(MixerConfig):
    """Base of the configs of softmax attention that an indexer may make sparse: `indexer` is an option of each.

    The option itself, and the rotary embedding that the indexer follows, are fields of the kinds.
    """

    indexer: IndexerConfig | None
    rope: RopeConfig
    loss_names: ClassVar[tuple[str, ...]] = ("indexer_kl",)
    uses_mscale: ClassVar[bool] = False  # whether YaRN's mscale_all_dim enters the softmax scale

    @property
    @abc.abstractmethod
    def index_rope_dim(self) -> int:
        """Default number of rotated dims of index queries and keys: as many as the mixer rotates."""

    def leaves(self, context: LayerContext) -> Sequence[SharedKind]:
        return (SELECTION,) if self.indexer is not None and not self.indexer.share else ()

    def reads(self, context: LayerContext) -> Sequence[SharedRead]:
        return (SHARED_SELECTION,) if self.indexer is not None and self.indexer.share else ()

    def check_sources(self, context: LayerContext) -> None:
        indexer = self.reading_indexer(context)
        if indexer is None or not indexer.share or indexer.mode == "dense":
            return
        source: IndexerConfig = context.shared_layout(SHARED_SELECTION)
        require(source.mode == "sparse", "indexer.mode", f"shares the selection of layer "
                f"{context.source_of(SHARED_SELECTION)}, which reads all keys and selects none", got=indexer.mode,
                expected="dense, or sparse in both layers")

    def shared_layout(self, kind: SharedKind, context: LayerContext) -> Any:
        """The indexer's config, which says how many keys a selection has."""
        return self.indexer if kind == SELECTION else super().shared_layout(kind, context)

    def reading_indexer(self, context: LayerContext) -> IndexerConfig | None:
        """The indexer with the sizes that hold in a layer: those of the layer whose selection it shares, or its own."""
        own = self.indexer
        if own is None or not own.share or not context.layers:
            return own
        source: IndexerConfig = context.shared_layout(SHARED_SELECTION)
        return replace(source, share=True, mode=own.mode, loss_weight=own.loss_weight)

    def forward_only_flops_per_token(self, context: LayerContext, context_length: int) -> float:
        return self.flops_per_token(context, context_length).get("indexer", 0.0)  # a selection has no gradient

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data["rope"] = self.rope.canonical(uses_mscale=self.uses_mscale)
        data["indexer"] = None if self.indexer is None else self.indexer.canonical(self.index_rope_dim)
        return data

    @classmethod
    def fill_sizes(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        filled = super().fill_sizes(options, model)
        if isinstance(filled.get("indexer"), Mapping):
            heads = model.heads_for(cls)
            head_dim = size_of(filled, "v_head_dim", size_of(filled, "head_dim", heads.head_dim))
            filled["indexer"] = IndexerConfig.fill_sizes(
                filled["indexer"], size_of(filled, "num_heads", heads.num_heads), head_dim, model.max_position)
        return filled

    @classmethod
    def idle_options(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        indexer = options.get("indexer")
        if not isinstance(indexer, Mapping) or indexer.get("share") is not True:
            return {}
        return {f"indexer.{key}": "indexer.share=true" for key in IndexerConfig.options_of_source()}

    def own_losses(self) -> tuple[str, ...]:
        return () if self.indexer is None else self.loss_names

    def indexer_gaps(self) -> list[str]:
        """Name the indexer, which has no published rule for carrying hyperparameters over width, where there is one."""
        return [] if self.indexer is None else ["indexers, which learn from a loss of their own"]

    def rotates(self) -> bool:
        return self.rope.kind != "none"

    def has_indexer(self) -> bool:
        return self.indexer is not None

    def indexer_topk(self) -> int | None:
        return None if self.indexer is None or self.indexer.share else self.indexer.topk

    def indexer_sizes(self, options: Mapping[str, Any], max_position: int) -> dict[str, Any]:
        heads: Any = self  # num_heads, and v_head_dim or head_dim, are fields of the kinds
        head_dim = getattr(heads, "v_head_dim", None) or heads.head_dim
        filled = IndexerConfig.fill_sizes(options, heads.num_heads, head_dim, max_position)
        if "head_dim" not in options and options.get("rope_kind") != "none":
            filled["head_dim"] = max(filled["head_dim"], size_of(options, "rope_dim", self.index_rope_dim))
        return filled

    def topk_multiple(self) -> int:
        return 1 if self.indexer is None else self.indexer.pool or 1

    def with_attention_mode(self, mode: AttentionMode) -> Self:
        return self._with_indexer_options(mode=mode)

    def with_topk(self, topk: int) -> Self:
        return self._with_indexer_options(topk=topk)

    def _with_indexer_options(self, **options: Any) -> Self:
        if self.indexer is None:
            return self
        return replace(self, indexer=replace(self.indexer, **options))  # type: ignore[call-arg]

    def selector_parameters(self) -> tuple[str, ...]:
        return () if self.indexer is None or self.indexer.share else ("indexer.*",)

    @classmethod
    def indexer_options(cls, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return options.get("indexer")

    def sees_all_keys(self) -> bool:
        """Whether a token attends to all earlier tokens of its document, and to nothing else."""
        return True

    def can_take_indexer(self) -> bool:
        return self.indexer is None and self.sees_all_keys()

    def with_indexer(self, indexer: IndexerConfig) -> Self:
        return dataclasses.replace(copy.deepcopy(self), indexer=copy.deepcopy(indexer))  # type: ignore[call-arg]


class IndexedMixer(SequenceMixer):
    """Base of mixers with the option `indexer`: holds the indexer, its loss, and what a training stage may switch.

    `measuring`: also report the recall of the selection where that costs a pass over the dense attention, and in
    evaluation. `kl_weight`: as `loss_weight` of the config. `selection_observer`: gets what is measured, in forwards
    that measure; None: nobody.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("k_norm.weight", "k_norm.bias", "weights_proj.weight")

    def __init__(self, config: IndexerConfig | None, context: LayerContext):
        super().__init__()
        self.indexer_config = config
        self.layer_index = context.layer_index
        self._attention_mode: AttentionMode = "dense" if config is None else config.mode
        self.kl_weight = 0.0 if config is None else config.loss_weight
        self.measuring = False
        self.selection_observer: Callable[[ObservedSelection], None] | None = None
        self.indexer: Indexer | None = None
        self.selection_is_read = context.is_read(SELECTION)
        self.selection_source = -1  # no layer
        if config is not None and config.share:
            self.selection_source = context.source_of(SHARED_SELECTION)

    def build_indexer(self, context: LayerContext, query_dim: int, rope: RopeConfig, rope_dim: int) -> None:
        """Add the `indexer` submodule (last, so that a dense mixer's parameters keep their order)."""
        config = self.indexer_config
        if config is not None and not config.share:
            self.indexer = Indexer(config, context, query_dim, rope, rope_dim)

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
        if self.indexer is not None and self.indexer.pool is not None:
            nn.init.zeros_(self.indexer.pool.bias)

    @property
    def index_pool(self) -> int | None:
        """Tokens per pool of the index keys that this layer keeps; None: one key per token."""
        return None if self.indexer is None else self.indexer.config.pool

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

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"indexer_kl": self.kl_weight}

    def set_attention(self, mode: AttentionMode | None, loss_weights: Mapping[str, float]) -> None:
        if self.indexer_config is not None:
            self.attention_mode = mode or self.indexer_config.mode
            self.kl_weight = loss_weights.get("indexer_kl", self.indexer_config.loss_weight)

    def set_topk(self, topk: int | None) -> None:
        if self.indexer is not None:
            self.indexer.topk = topk or self.indexer.config.topk

    def selected_keys(self) -> int | None:
        return self.indexer.topk if self.indexer is not None and self.attention_mode == "sparse" else None

    def freeze_idle_parameters(self, later: Sequence[SequenceMixer] = ()) -> None:
        """Freeze an indexer that neither its own layer's loss nor that of a later layer which shares it trains."""
        if self.indexer is None:
            return
        indexed = (mixer for mixer in later if isinstance(mixer, IndexedMixer) and mixer.indexer_config is not None)
        readers = takewhile(lambda mixer: mixer.indexer is None, indexed)
        if not any(mixer.kl_weight > 0 for mixer in (self, *readers)):
            self.indexer.requires_grad_(False)

    def measure_selection(self, on: bool) -> None:
        self.measuring = on and self.indexer_config is not None

    def select(self, x_BTD: Tensor, query_input_BTQ: Tensor, seq: SequenceInfo,
               cache: IndexCache | None) -> Selection:
        """Select the keys that attention reads. No gradient passes to the inputs.

        Args:
            x_BTD: input of the mixer.
            query_input_BTQ: input of the index queries.
            seq: positions and borders of the documents.
            cache: index keys of the decode state, updated in place; None in training.
        """
        if self.indexer_config is None:
            return Selection()
        dense = self._attention_mode == "dense"
        if self.indexer is None:
            source: Selection = seq.read(SELECTION, self.selection_source)
            wanted = source.indexer is not None and (
                self.measuring or selector_trains(self, source.indexer, self.kl_weight))
            return replace(source, indices=None if dense else source.indices, index=source.index if wanted else None)
        index = chosen = None
        learns = selector_trains(self, self.indexer, self.kl_weight)
        if cache is None and (self.measuring or learns):
            with torch.set_grad_enabled(learns):
                index = self.indexer.tensors(x_BTD, query_input_BTQ, seq)
            chosen = self.indexer.choose(index, seq, x_BTD.shape[1])
        elif not dense:
            with torch.no_grad():
                chosen = self.indexer(x_BTD, query_input_BTQ, seq, cache)
        selection = Selection(None if dense else chosen, chosen, self.indexer, index)
        if self.selection_is_read:
            seq.leave(SELECTION, self.layer_index, selection)
        return selection

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seq: SequenceInfo, selection: Selection, *,
               scale: float | None = None, **options: Any) -> tuple[Tensor, Aux]:
        """Attention over all keys or the selected ones, and what the indexer has to learn from it.

        With a selection, keys and values are those of `seq.history`. `options`: of `dense_attention`.
        """
        if selection.indices is not None:
            aux = self.observe(selection, q_BTHK, k_BSGK, seq, scale)
            return sparse_attention(q_BTHK, k_BSGK, v_BSGV, selection.indices, scale=scale), aux
        aux = {}
        if selection.index is not None:
            aux = self.observe(selection, q_BTHK, seq.history(k_BSGK.detach()), seq, scale)
        return dense_attention(q_BTHK, k_BSGK, v_BSGV, seq, scale=scale, **options), aux

    def observe(self, selection: Selection, q_BTHK: Tensor, k_BSGK: Tensor, seq: SequenceInfo,
                scale: float | None = None) -> Aux:
        """The loss of the indexer and its statistics, from the main attention's queries and keys.

        The loss is over the keys that attention reads: all of them, or the selected. Recall is against the dense
        attention; it comes with a dense layer's loss and is measured apart in a sparse one. A layer that shares has
        its own such loss: the mean over layers is, but for a constant, the KL from their mean attention.
        """
        if selection.index is None or selection.indexer is None:
            return {}
        everything = selection.indices is None
        chosen = selection.chosen
        if self.selection_observer is not None and chosen is not None:
            self.selection_observer(ObservedSelection(self.layer_index, q_BTHK, k_BSGK, chosen, seq.selection_borders,
                                                      q_BTHK.shape[3] ** -0.5 if scale is None else scale))
        result = selection.indexer.loss(selection.index, q_BTHK, k_BSGK, seq, indices_BTN=selection.indices,
                                        recall_of_BTN=chosen if everything else None, scale=scale)
        recall = result.recall
        if self.measuring and not everything:
            assert selection.indices is not None
            recall = attention_recall(q_BTHK, k_BSGK, selection.indices, scale=scale, cu_seqlens=seq.selection_borders)
        aux = {"loss/indexer_kl": result.loss, "layer/indexer_kl": result.loss.detach(),
               "layer/indexer_entropy": result.entropy}
        if recall is not None and chosen is not None and seq.shard is not None:
            chose_BT = seq.among_text(seq.positions_BT + 1 > (chosen >= 0).sum(-1))  # recall is a mean over these
            recall = Recall(*(seq.weighted_mean(x, chose_BT.sum()) for x in recall))
        if recall is None and chosen is None:  # every key is selected
            recall = Recall(*[torch.ones_like(result.entropy)] * 3)
        if recall is not None:
            aux |= {"layer/indexer_recall": recall.mass, "layer/indexer_agreement": recall.agreement,
                    "layer/indexer_attainable": recall.attainable}
        return aux


def indexed_mixers(model: nn.Module) -> list[IndexedMixer]:
    """List the mixers with an indexer, of their own or shared, in the order of the layers."""
    return [m for m in model.modules() if isinstance(m, IndexedMixer) and m.indexer_config is not None]
