"""What every layer may know about the tokens of a batch: positions and document borders, made once a forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridlm.model.context_parallel import RowShard, ShardGroup
from hybridlm_kernels.packing import CuSeqlens


@dataclass
class SequenceInfo:
    """Shapes: B rows, T tokens a row (here of a shard, where rows are split), S tokens that they may see.

    `cu_seqlens` counts tokens of the flattened rows (B*T of them); every row start is a border, so documents
    never cross rows. None means that each row is one document.
    `shared` is a scratch pad for one forward pass: what a layer leaves for later layers (selected indices, ...).
    `shard`: where several processes hold shards of the rows, what a mixer may ask for of the others' tokens; then all
    the rest describes the tokens held here.
    """

    positions_BT: Tensor  # int64, counted from the start of the document (plus what the decode state holds)
    cu_seqlens: CuSeqlens | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    shard: RowShard | None = None

    @classmethod
    def make(cls, batch: int, length: int, device: torch.device, cu_seqlens: CuSeqlens | None = None,
             offset: int = 0) -> SequenceInfo:
        """Positions from borders. `offset` tokens are already in the decode state (not with `cu_seqlens`)."""
        if cu_seqlens is None:
            positions_T = torch.arange(offset, offset + length, device=device)
            return cls(positions_T.expand(batch, length))
        return cls(cu_seqlens.positions().view(batch, length), cu_seqlens)

    def split(self, shard_group: ShardGroup) -> SequenceInfo:
        """Of whole rows: this process's shard of them."""
        shard = RowShard.of(shard_group, self.positions_BT, self.cu_seqlens)
        return SequenceInfo(shard.positions_BL, shard.local_borders, shard=shard)

    def own(self, x_BT: Tensor) -> Tensor:
        """The tokens held here, of whole rows [B, T, ...]."""
        return x_BT if self.shard is None else self.shard.own(x_BT)

    def history(self, x_BT: Tensor) -> Tensor:
        """[B, S, ...]: all tokens that those held here may see, of which these are the last."""
        return x_BT if self.shard is None else self.shard.history(x_BT)

    @property
    def history_borders(self) -> CuSeqlens | None:
        """Borders of the documents of `history`."""
        return self.cu_seqlens if self.shard is None else self.shard.history_borders

    def documents(self) -> tuple[Tensor, int]:
        """int64 [B * T], the document of each token, and their number, those of other shards included."""
        if self.shard is not None:
            return self.shard.documents()
        if self.cu_seqlens is not None:
            return self.cu_seqlens.document_ids(), self.cu_seqlens.num_documents
        batch, length = self.positions_BT.shape
        return torch.arange(batch, device=self.positions_BT.device).repeat_interleave(length), batch

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum over the shards of the rows. No gradient."""
        return x if self.shard is None else self.shard.group.all_sum(x)
