"""Positions and documents of the tokens of a batch, computed once per forward and read by every layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridlm.model.context_parallel import RowShard, ShardGroup
from hybridlm.model.sharing import SharedKind, SharedStore
from hybridlm_kernels.packing import CuSeqlens


@dataclass
class SequenceInfo:
    """Positions and documents of the tokens of one forward.

    B rows, T tokens per row (of the shard held here, where rows are divided), S tokens that these may see.

    `cu_seqlens` counts tokens of the flattened rows (B*T of them); every row start is a border, so documents
    never cross rows. None means that each row is one document.
    `shard` exchanges with the processes that hold other shards of the same rows; all other fields then
    describe the tokens held here.
    `shared` holds what layers have left for later layers in this forward; see `leave` and `read`.
    `padding_B` is set while decoding rows that hold unlike numbers of tokens: the number of entries in front of each
    row's own in decode states with one entry per token; `last_position` counts these entries too.
    `tables` holds what any layer has computed from positions alone, such as rotary tables, under a name that says
    everything it depends on.
    `token_ids_BT` are the ids of the tokens held here, for layers with a table of their own; None where the model was
    given embeddings. `embedding_BTD` is their embedding before the first layer, for layers that read it again; None
    outside a model.
    `text_BT` is False for padding among the tokens held here, which only rows that are divided can hold: elsewhere
    padding is taken out before the layers. None: all tokens are text.
    """

    positions_BT: Tensor  # int64, counted from the start of the document (plus what the decode state holds)
    cu_seqlens: CuSeqlens | None = None
    shard: RowShard | None = None
    padding_B: Tensor | None = None
    last_position: int = -1  # of the entries of decode states; -1 without one
    shared: SharedStore = field(default_factory=lambda: SharedStore())  # not the class: torch.compile
    tables: dict[str, Any] = field(default_factory=dict)
    token_ids_BT: Tensor | None = None
    embedding_BTD: Tensor | None = None
    text_BT: Tensor | None = None

    @classmethod
    def make(cls, batch: int, length: int, device: torch.device, cu_seqlens: CuSeqlens | None = None,
             offset: int = 0, padding_B: Tensor | None = None) -> SequenceInfo:
        """Describe rows of `length` tokens.

        Args:
            batch: number of rows.
            length: tokens per row.
            device: where the positions are made.
            cu_seqlens: borders of packed documents over the flattened rows; None: each row is one document.
            offset: tokens per row that are in the decode state already; not with `cu_seqlens`.
            padding_B: int64 [B], how many of these are padding in front of each row; None: none.

        Raises:
            ValueError: there is no row, or rows have no token.

        Example:
            >>> SequenceInfo.make(1, 5, torch.device("cpu"), CuSeqlens([0, 2, 5])).positions_BT.tolist()
            [[0, 1, 0, 1, 2]]
        """
        if batch == 0 or length == 0:
            raise ValueError(f"layers need at least one row and one token; got {batch} rows of {length} tokens")
        if cu_seqlens is None:
            positions_T = torch.arange(offset, offset + length, device=device)
            if padding_B is None:
                return cls(positions_T.expand(batch, length), last_position=offset + length - 1)
            return cls(positions_T - padding_B[:, None], padding_B=padding_B, last_position=offset + length - 1)
        return cls(cu_seqlens.positions().view(batch, length), cu_seqlens)

    def shard_rows(self, shard_group: ShardGroup, text_mask: Tensor | None = None) -> SequenceInfo:
        """Describe this process's shard of the rows.

        Args:
            shard_group: the processes that hold the shards.
            text_mask: bool [B, T], False for padding; None: there is none.

        Returns:
            Positions and borders of the tokens held here, with `shard` set.

        Raises:
            ValueError: rows whose length is no multiple of the number of shards.
        """
        shard = RowShard.of(shard_group, self.positions_BT, self.cu_seqlens, text_mask)
        ids = self.token_ids_BT
        return SequenceInfo(shard.positions_BL, shard.local_borders, shard=shard,
                            token_ids_BT=None if ids is None else shard.local_tokens(ids),
                            text_BT=None if text_mask is None else shard.local_tokens(text_mask))

    def leave(self, kind: SharedKind, layer: int, value: Any) -> None:
        """Leave a value of layer `layer` for later layers, as its kind says.

        Args:
            kind: says whether gradients pass, and what readers get where rows are divided.
            layer: index of the layer that leaves it.
            value: a tensor, or plain data or a dataclass of tensors; of a "gathered" kind a tensor [B, T, ...].
        """
        if not kind.gradient:
            value = _detached(value)
        if kind.context_parallel == "gathered":
            value = self.history(value)
        self.shared.leave(kind, layer, value)

    def read(self, kind: SharedKind, layer: int) -> Any:
        """The value that layer `layer` left in this forward.

        Raises:
            RuntimeError: it has left none.
        """
        return self.shared.read(kind, layer)

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        """The tokens held here, from all tokens of the rows [B, T, ...]."""
        return x_BT if self.shard is None else self.shard.local_tokens(x_BT)

    def history(self, x_BT: Tensor) -> Tensor:
        """All tokens that those held here may see, of which these are the last: [B, S, ...]."""
        return x_BT if self.shard is None else self.shard.history(x_BT)

    @property
    def history_borders(self) -> CuSeqlens | None:
        """Borders of the documents of `history`."""
        return self.cu_seqlens if self.shard is None else self.shard.history_borders

    @property
    def selection_borders(self) -> CuSeqlens | None:
        """The same for a selection of keys and what it learns from: each token of padding is a document of its own."""
        return self.cu_seqlens if self.shard is None else self.shard.selection_borders

    def documents(self) -> tuple[Tensor, int]:
        """The document of each token, int64 [B * T], and the number of documents, those of other shards included."""
        if self.shard is not None:
            return self.shard.documents()
        if self.cu_seqlens is not None:
            return self.cu_seqlens.document_ids(), self.cu_seqlens.num_documents
        batch, length = self.positions_BT.shape
        return torch.arange(batch, device=self.positions_BT.device).repeat_interleave(length), batch

    def text_of(self, x_N: Tensor) -> Tensor:
        """The rows of x [B * T, ...] that belong to text."""
        return x_N if self.text_BT is None else x_N[self.text_BT.flatten()]

    def mean_over_text(self, x_N: Tensor) -> Tensor:
        """The mean of x [B * T] over the tokens held here that belong to text; 0 where none does."""
        if self.text_BT is None:
            return x_N.mean()
        text = self.text_of(x_N)
        return text.sum() / max(1, len(text))

    def among_text(self, mask_BT: Tensor) -> Tensor:
        """The mask [B, T] without padding."""
        return mask_BT if self.text_BT is None else mask_BT & self.text_BT

    def weighted_mean(self, mean: Tensor, count: Tensor) -> Tensor:
        """Weight a mean over values held here so that the mean over shards, by their text, is that over all values.

        Args:
            mean: mean over `count` values of the text held here.
            count: int64 scalar; where it is 0 in all shards, `mean` is returned unchanged.
        """
        if self.shard is None:
            return mean
        if self.text_BT is None:
            total, weight = self.all_sum(count), count.to(mean.dtype) * self.shard.group.size
        else:
            text = self.text_BT.sum()
            total, all_text = self.all_sum(torch.stack([count, text]))
            weight = count.to(mean.dtype) * all_text / text.clamp(min=1)
        return torch.where(total > 0, mean * weight / total.clamp(min=1), mean)

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum of x over the shards of the rows, without gradient."""
        return x if self.shard is None else self.shard.group.all_sum(x)


def _detached(value: Any) -> Any:
    """The same value without gradients of its tensors."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple | list):
        return type(value)(_detached(item) for item in value)
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _detached(getattr(value, f.name))
                                             for f in dataclasses.fields(value)})
    return value
