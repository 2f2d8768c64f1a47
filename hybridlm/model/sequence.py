"""What every layer may know about the tokens of a batch: positions and document borders, made once a forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens


@dataclass
class SequenceInfo:
    """Shapes: B rows, T tokens a row.

    `cu_seqlens` counts tokens of the flattened rows (B*T of them); every row start is a border, so documents
    never cross rows. None means that each row is one document.
    `shared` is a scratch pad for one forward pass: what a layer leaves for later layers (selected indices, ...).
    """

    positions_BT: Tensor  # int64, counted from the start of the document (plus what the decode state holds)
    cu_seqlens: CuSeqlens | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, batch: int, length: int, device: torch.device, cu_seqlens: CuSeqlens | None = None,
             offset: int = 0) -> SequenceInfo:
        """Positions from borders. `offset` tokens are already in the decode state (not with `cu_seqlens`)."""
        if cu_seqlens is None:
            positions_T = torch.arange(offset, offset + length, device=device)
            return cls(positions_T.expand(batch, length))
        return cls(cu_seqlens.positions().view(batch, length), cu_seqlens)
