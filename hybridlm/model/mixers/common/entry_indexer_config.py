"""Configuration of the lightning indexer over compressed entries, and of the candidates that it marks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hybridlm.errors import require
from hybridlm.model.mixers.common.cost import count_visible_pools
from hybridlm.model.mixers.common.gated_entries import EntryForm
from hybridlm.model.mixers.module import AttentionMode
from hybridlm.model.mixers.sizing import size_of
from hybridlm.plain_data import to_dict


@dataclass(kw_only=True)
class CandidateConfig:
    """Configuration of the candidates that one layer marks for the indexers of later layers (DeepSeek-V4.1).

    Args:
        block: consecutive entries that are marked together, counted from the start of the document.
        topk: blocks that are marked per token: those of highest score of an entry, and always that of the newest entry.
    """

    block: int = 8
    topk: int = 2048

    def __post_init__(self) -> None:
        for key in ("block", "topk"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    @property
    def entries(self) -> int:
        """Entries that are marked at most."""
        return self.block * self.topk


@dataclass(kw_only=True)
class EntryIndexerConfig:
    """Configuration of an indexer over entries.

    Args:
        num_heads: index heads Hi.
        head_dim: dims per index head Di, at least those that rotate.
        topk: entries that a token reads.
        loss_weight: of KL(attention to entries || softmax(I)), the loss that trains the indexer; 0 leaves it untrained.
        mode: `dense` reads all entries and keeps the parameters, as before a stage of sparse training.
        key_input: index keys are pooled from `tokens`, as entries of their own (DeepSeek-V4), or projected from the
            `entries` of attention before their rotation, and normed (DeepSeek-V4.1).
        candidates: entries that the indexers of layers which share these entries may select; null: all.
        share: the layer has no indexer of its own and reads the selection of the nearest earlier layer with one.
    """

    num_heads: int = 64
    head_dim: int = 128
    topk: int = 512
    loss_weight: float = 1.0
    mode: AttentionMode = "sparse"
    key_input: Literal["tokens", "entries"] = "tokens"
    candidates: CandidateConfig | None = None
    share: bool = False

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "topk"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.loss_weight >= 0, "loss_weight", "must not be negative", got=self.loss_weight)

    @staticmethod
    def fill_sizes(options: Mapping[str, Any], heads: Mapping[str, int], entries: int) -> dict[str, Any]:
        """`options` with the sizes that they leave open.

        An eighth of the entries of the longest context is read, at most 512, and half of them are candidates, at most
        2048 blocks.

        Args:
            options: plain data of this config.
            heads: `num_heads` and `head_dim`.
            entries: those of the longest context.

        >>> EntryIndexerConfig.fill_sizes({"candidates": {}}, {"num_heads": 4, "head_dim": 16}, entries=1024)
        {'num_heads': 4, 'head_dim': 16, 'topk': 128, 'candidates': {'block': 8, 'topk': 64}}
        """
        filled = {**heads, "topk": max(1, min(512, entries // 8)), **options}
        candidates = filled.get("candidates")
        if isinstance(candidates, Mapping):
            block = size_of(candidates, "block", 8)
            filled["candidates"] = {"block": block, "topk": max(1, min(2048, entries // (2 * block))), **candidates}
        return filled

    def canonical(self, shares_entries: bool) -> dict[str, Any]:
        """The options that the selection depends on, as plain data.

        Args:
            shares_entries: index keys are those of an earlier layer.
        """
        if self.share:
            return {"share": True, "mode": self.mode}
        data = to_dict(self)
        data.pop("loss_weight")  # says only how the indexer is trained
        return data | {"key_input": None} if shares_entries else data

    def query_weights(self, hidden_size: int, query_dim: int) -> int:
        """Number of weights of the projections to index queries and head weights."""
        return 0 if self.share else query_dim * self.num_heads * self.head_dim + hidden_size * self.num_heads

    def key_weights(self, hidden_size: int, form: EntryForm | None) -> int:
        """Number of weights of the projections to index keys; `form`: of the layer's own entries, None without."""
        if form is None:
            return 0
        if self.key_input == "entries":
            return form.dim * self.head_dim
        return form.of_dim(self.head_dim).projection_weights(hidden_size)

    def num_params(self, hidden_size: int, query_dim: int, form: EntryForm | None) -> int:
        """Number of parameters; `form`: of the layer's own entries, None without."""
        own = self.query_weights(hidden_size, query_dim)
        if form is None:
            return own
        if self.key_input == "entries":
            return own + self.key_weights(hidden_size, form) + self.head_dim
        return own + form.of_dim(self.head_dim).num_params(hidden_size)

    def score_flops(self, context_length: int, ratio: int) -> float:
        """FLOPs per token of the scores of the entries that a token sees."""
        return 2.0 * self.num_heads * (self.head_dim + 1) * count_visible_pools(context_length, ratio)

    def state_numbers(self, context_length: int, form: EntryForm | None, keys_are_read: bool) -> int:
        """Numbers of index keys in the decode state; those of projected keys are kept in the dense mode too.

        Args:
            context_length: tokens that were seen.
            form: of the layer's own entries; None without.
            keys_are_read: later layers score the same index keys.
        """
        if form is None:
            return 0
        if self.key_input == "entries":
            return context_length // form.ratio * self.head_dim
        dense = self.mode == "dense" and not keys_are_read
        return 0 if dense else form.of_dim(self.head_dim).state_numbers(context_length)
