"""Padding is taken out before the layers, so that nothing can count it: losses, expert loads, statistics.

B rows, T tokens per row, N tokens that are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm.model.targets import IGNORE
from hybridlm_kernels.packing import CuSeqlens


@dataclass(frozen=True)
class TextTokens:
    """The tokens of a batch that are no padding, laid end to end in one row of packed documents.

    Attributes:
        places: indices of these tokens among the flattened B*T, int64 [N].
        batch: rows B.
        length: tokens per row T.
        borders: borders of their documents over the N tokens.
    """

    places: Tensor
    batch: int
    length: int
    borders: CuSeqlens

    @classmethod
    def of(cls, text_mask: Tensor, cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
           device: torch.device | None = None) -> TextTokens | None:
        """Find the text of a batch; None where all of it is text.

        Args:
            text_mask: bool [B, T], False for padding. One on a GPU costs a synchronisation.
            cu_seqlens: borders of packed documents over the B*T tokens; None: each row is one document.
            device: that of the tokens; None: that of the mask.

        Raises:
            ValueError: nothing is text, or borders that do not fit.

        Example:
            >>> text = TextTokens.of(torch.tensor([[True, True, False], [True, False, False]]))
            >>> text.places.tolist(), list(text.borders.host)
            ([0, 1, 3], [0, 2, 3])
        """
        batch, length = text_mask.shape
        host_N = text_mask.reshape(-1).cpu()
        if bool(host_N.all()):
            return None
        if not bool(host_N.any()):
            raise ValueError("every token of the batch is padding")
        if cu_seqlens is None:
            borders = list(range(0, batch * length + 1, length))
        else:
            documents = CuSeqlens.of(cu_seqlens, "cpu")
            documents.check(batch, length)
            borders = list(documents.host)
        counted = torch.nn.functional.pad(host_N.cumsum(0), (1, 0))  # text tokens before each place
        kept = sorted(set(counted[borders].tolist()))
        device = text_mask.device if device is None else device
        return cls(host_N.nonzero()[:, 0].to(device), batch, length, CuSeqlens(kept, device))

    def pack(self, x: Tensor) -> Tensor:
        """Take the text of [B, T, ...]: [1, N, ...]."""
        return x.flatten(0, 1)[self.places][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Put [1, N, ...] back into its places: [B, T, ...], zero for padding."""
        whole = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return whole.index_copy(0, self.places, x[0]).unflatten(0, (self.batch, self.length))


def text_before_last_label(labels: Tensor) -> Tensor | None:
    """Mark the tokens up to the last label of each row, bool [B, T]; what follows it reaches no loss.

    None where nothing has a label.

    Args:
        labels: int64 [B, T], -100 where a token does not count.
    """
    counts_BT = labels != IGNORE
    if not bool(counts_BT.any()):
        return None
    return counts_BT.int().flip(1).cummax(1).values.flip(1).bool()
