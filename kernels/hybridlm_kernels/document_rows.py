"""Packed documents as rows of their own: documents of about one length become the rows of one call.

Padding at the end of a document needs no mask in causal operations, because it comes after every token that counts.

B rows, T tokens per row, N tokens of all rows, P slots in a buffer of padded documents, L tokens of a padded document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens


def each_document_row(run: Callable[..., Tensor], tokens: Sequence[Tensor], cu_seqlens: CuSeqlens) -> Tensor:
    """Apply a causal operation to packed documents, each as a row of its own.

    Args:
        run: the operation, from tensors [documents, L, ...] to one [documents, L, ...]; a row is one document, which
            zeros follow up to L.
        tokens: tensors [B, T, ...] of the packed rows.
        cu_seqlens: borders of the documents, none of them empty.

    Returns:
        The outputs [B, T, ...].

    >>> x = torch.ones(1, 5, 1)
    >>> each_document_row(lambda x: x.cumsum(1), [x], CuSeqlens([0, 2, 5])).flatten()
    tensor([1., 2., 1., 2., 3.])
    """
    slots = _Slots.of(cu_seqlens)
    groups = [_ToSlots.apply(x.flatten(0, 1), slots).split(slots.sizes) for x in tokens]
    out = [run(*(x[i].unflatten(0, shape) for x in groups)).flatten(0, 1) for i, shape in enumerate(slots.shapes)]
    o_NX = _FromSlots.apply(torch.cat(out) if len(out) > 1 else out[0], slots)
    return o_NX.unflatten(0, tokens[0].shape[:2])


class _Slots:
    """Documents grouped by length, those of a group padded to its longest (by an eighth at most, or 15)."""

    def __init__(self, cu_seqlens: CuSeqlens):
        groups: dict[int, list[tuple[int, int]]] = {}
        for start, stop in zip(cu_seqlens.host, cu_seqlens.host[1:], strict=False):
            step = max(16, (1 << (stop - start).bit_length()) // 16)
            groups.setdefault((stop - start - 1) // step * step, []).append((start, stop))
        self.shapes = [(len(group), max(b - a for a, b in group)) for _, group in sorted(groups.items())]
        self.sizes = [count * length for count, length in self.shapes]
        row_P = torch.zeros(sum(self.sizes), dtype=torch.int64)
        slot_N = torch.empty(cu_seqlens.num_tokens, dtype=torch.int64)
        real_P = torch.zeros(len(row_P), dtype=torch.bool)
        slot = 0
        for (_, length), (_, group) in zip(self.shapes, sorted(groups.items()), strict=True):
            for start, stop in group:
                torch.arange(start, stop, out=row_P[slot : slot + stop - start])
                torch.arange(slot, slot + stop - start, out=slot_N[start:stop])
                real_P[slot : slot + stop - start] = True
                slot += length
        self.row_P = row_P.to(cu_seqlens.device)  # the token in each slot; 0 in padding
        self.padding = (~real_P).nonzero()[:, 0].to(cu_seqlens.device)  # the slots without a token
        self.slot_N = slot_N.to(cu_seqlens.device)  # the slot of each token

    @classmethod
    def of(cls, cu_seqlens: CuSeqlens) -> _Slots:
        if "document_rows" not in cu_seqlens.cache:
            cu_seqlens.cache["document_rows"] = cls(cu_seqlens)
        return cu_seqlens.cache["document_rows"]

    def fill(self, x_NX: Tensor) -> Tensor:
        """Tokens in their slots, zeros in padding."""
        y_PX = x_NX.index_select(0, self.row_P)
        return y_PX.index_fill_(0, self.padding, 0.0) if len(self.padding) else y_PX


class _ToSlots(torch.autograd.Function):
    """Copies tokens to their slots; the gradient is a gather too, where autograd's own would add rows one by one."""

    @staticmethod
    def forward(ctx, x_NX: Tensor, slots: _Slots) -> Tensor:
        ctx.slots = slots
        return slots.fill(x_NX)

    @staticmethod
    def backward(ctx, dy_PX):
        return dy_PX.index_select(0, ctx.slots.slot_N), None


class _FromSlots(torch.autograd.Function):
    """Copies slots back to their tokens, the reverse of `_ToSlots`."""

    @staticmethod
    def forward(ctx, y_PX: Tensor, slots: _Slots) -> Tensor:
        ctx.slots = slots
        return y_PX.index_select(0, slots.slot_N)

    @staticmethod
    def backward(ctx, dx_NX):
        return ctx.slots.fill(dx_NX), None
