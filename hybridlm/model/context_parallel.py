"""Context parallelism: rows are divided into shards, one per process, and layers exchange tensors between them.

Every process holds one shard of all rows of a batch, and all weights. Its `ShardGroup` brings tensors of the other
processes; everything else here is computed on one device. `SequenceInfo.shard` is None where rows are not divided.
A mixer or feed-forward asks for one of:

    by_heads        all tokens of the rows for some of the heads (softmax attention)
    history         a small tensor of all tokens up to the end of the shard (keys of sparse attention)
    tail            the inputs of the last few tokens before the shard (convolution, token shift)
    incoming        the state at the start of the shard, for mixers that are linear in their state (recurrences)

B rows, T tokens per row, P shards, L = T / P tokens per shard, S tokens up to the end of this shard, N documents of
this shard, H heads, HV value heads, K/V key/value dim of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens


class ShardGroup(Protocol):
    """The processes that hold the shards of the same rows.

    All of them make the same calls in the same order. Gradients travel back the same ways, so the results of `gather`,
    `exchange` and `from_previous` must enter the loss in every process, if only as zeros.
    """

    rank: int  # index of the shard that is held here
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """Gather the x of all processes: [P, ...], in the order of their shards."""

    def exchange(self, x_P: Tensor) -> Tensor:
        """Send entry j of x to shard j; entry i of the result [P, ...] comes from shard i."""

    def from_previous(self, x: Tensor) -> Tensor:
        """Receive the x of the shard before this one; zeros in the first."""

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum x over all processes, without gradient."""


@dataclass(eq=False)
class RowShard:
    """The shard of this process: tokens rank*L .. rank*L + L - 1 of each of B rows, and exchanges with other shards."""

    group: ShardGroup
    length: int  # L, tokens per row held here
    positions_BL: Tensor  # int64, counted from the start of the document, which may lie in an earlier shard
    borders: CuSeqlens | None  # of the documents of the undivided rows; None where each row is one document
    local_borders: CuSeqlens | None  # of the parts of these documents that are held here
    text_mask: Tensor | None = None  # bool [B, T] of the undivided rows, False for padding; None: there is none

    @classmethod
    def of(cls, group: ShardGroup, positions_BT: Tensor, borders: CuSeqlens | None,
           text_mask: Tensor | None = None) -> RowShard:
        """Make the shard of this process.

        Args:
            group: the processes that hold the other shards.
            positions_BT: positions of all tokens of the rows.
            borders: of the documents of the rows, or None where each row is one document.
            text_mask: bool [B, T], False for padding; None: there is none.

        Raises:
            ValueError: rows whose length is no multiple of the number of shards.
        """
        length = positions_BT.shape[1]
        if length % group.size:
            raise ValueError(f"rows of {length} tokens cannot be divided into {group.size} equal shards")
        each = length // group.size
        begin = group.rank * each
        local_borders = None if borders is None else _borders_between(borders, length, begin, begin + each)
        return cls(group, each, positions_BT[:, begin : begin + each], borders, local_borders, text_mask)

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        """The tokens held here, from all tokens of the rows [B, T, ...]."""
        return x_BT.unflatten(1, (self.group.size, self.length))[:, self.group.rank]

    @cached_property
    def longest_document(self) -> int:
        """Tokens of the longest document of the undivided rows: the same number in all shards, which decide by it."""
        return self.group.size * self.length if self.borders is None else max(self.borders.lengths)

    def documents(self) -> tuple[Tensor, int]:
        """The document of each token held here, int64 [B * L], and the number of documents of the undivided rows."""
        if self.borders is None:
            batch = self.positions_BL.shape[0]
            return torch.arange(batch, device=self.positions_BL.device).repeat_interleave(self.length), batch
        ids_BT = self.borders.document_ids().view(self.positions_BL.shape[0], -1)
        return self.local_tokens(ids_BT).flatten(), self.borders.num_documents

    # All tokens for some of the heads

    def by_heads(self, *xs_BLHK: Tensor) -> list[Tensor]:
        """Exchange tokens for heads: all tokens of the heads of this process, in one all-to-all for all tensors.

        Args:
            xs_BLHK: tensors [B, L, H, K] of the tokens held here; P divides H, which may differ between them.

        Returns:
            A tensor [B, T, H / P, K] for each.
        """
        size = self.group.size
        shapes = [(x.shape[0], self.length, x.shape[2] // size, x.shape[3]) for x in xs_BLHK]
        sent_PX = torch.cat([x.unflatten(2, (size, -1)).movedim(2, 0).flatten(1) for x in xs_BLHK], 1)
        received = self.group.exchange(sent_PX).split([math.prod(shape) for shape in shapes], 1)
        return [x.unflatten(1, shape).movedim(0, 1).flatten(1, 2) for x, shape in zip(received, shapes, strict=True)]

    def by_tokens(self, x_BTHK: Tensor) -> Tensor:
        """Exchange heads for tokens, the inverse of `by_heads`: [B, T, H / P, K] -> [B, L, H, K]."""
        sent_PBLHK = x_BTHK.unflatten(1, (self.group.size, self.length)).movedim(1, 0)
        return self.group.exchange(sent_PBLHK).movedim(0, 2).flatten(2, 3)

    def local_heads(self, x_H: Tensor) -> Tensor:
        """The entries [H / P] of the heads that `by_heads` brings here, from those of all heads."""
        return x_H.unflatten(0, (self.group.size, -1))[self.group.rank]

    # Tensors of earlier tokens

    def all_tokens(self, x_BL: Tensor) -> Tensor:
        """All tokens of the rows [B, T, ...], those of the other shards included."""
        return self.group.gather(x_BL).movedim(0, 1).flatten(1, 2)

    def history(self, x_BL: Tensor) -> Tensor:
        """The tokens up to the end of this shard [B, S, ...], from those held here."""
        return self.all_tokens(x_BL)[:, : self.history_length]

    @property
    def history_length(self) -> int:
        """S, the number of tokens per row up to the end of this shard."""
        return (self.group.rank + 1) * self.length

    @cached_property
    def history_borders(self) -> CuSeqlens | None:
        """Borders of the documents, as far as `history` holds them."""
        if self.borders is None:
            return None
        return _borders_between(self.borders, self.group.size * self.length, 0, self.history_length)

    @cached_property
    def selection_borders(self) -> CuSeqlens | None:
        """`history_borders` in which each token of padding is a document of its own, which sees itself alone.

        A selection of keys, its loss and its entropy are then trivial for padding: exactly 0, without a gradient.
        """
        if self.text_mask is None:
            return self.history_borders
        batch, length = self.text_mask.shape[0], self.history_length
        padding_X = (~self.text_mask[:, :length]).flatten().nonzero()[:, 0]
        known = range(0, batch * length + 1, length) if self.history_borders is None else self.history_borders.host
        alone = {*padding_X.tolist(), *(padding_X + 1).tolist()}
        return CuSeqlens(sorted(alone.union(known)), self.positions_BL.device)

    # From earlier shards

    def tail(self, x_BLD: Tensor, tokens: int) -> Tensor:
        """The last `tokens` tokens before the shard, [B, tokens, D]; zeros where they belong to another document."""
        tail_BWD = self.group.from_previous(x_BLD[:, self.length - tokens :])
        distance_W = torch.arange(tokens, 0, -1, device=x_BLD.device)
        return torch.where((distance_W <= self.positions_BL[:, :1])[..., None], tail_BWD, 0.0)

    @property
    def continues_B(self) -> Tensor:
        """Whether the first document of each row has begun in an earlier shard: bool [B]."""
        return self.positions_BL[:, 0] > 0

    def at_start(self, x_B: Tensor) -> Tensor:
        """Values per document [N, ...]: x for the first document of each row, zeros for those that begin here."""
        if self.local_borders is None:
            return x_B
        room = x_B.new_zeros(self.local_borders.num_documents, *x_B.shape[1:])
        return room.index_copy(0, self._document_at(0), x_B)

    def at_end(self, x_N: Tensor) -> Tensor:
        """The values x [B, ...] of the last document of each row."""
        return x_N if self.local_borders is None else x_N.index_select(0, self._document_at(self.length - 1))

    def _document_at(self, column: int) -> Tensor:
        """The document of token `column` of each row: int64 [B]."""
        assert self.local_borders is not None
        return self.local_borders.document_ids().view(-1, self.length)[:, column]

    def continued_tokens(self) -> Tensor:
        """Whether each token is of a document that has begun in an earlier shard: bool [B, L]."""
        step_L = torch.arange(self.length, device=self.positions_BL.device)
        start_B1 = self.positions_BL[:, :1]
        return (self.positions_BL == start_B1 + step_L) & (start_B1 > 0)

    def incoming(self, local_BHvKV: Tensor, transition: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The recurrent state [B, HV, K, V] at the start of the shard, by one gather.

        Each shard maps the state S at its start to the state at its end: S -> apply(transition, S) + local.

        Args:
            local_BHvKV: the state at the end of this shard, if it were zero at the start.
            transition: numbers [B, HV, ...] by which `apply` maps a state; zero where the last document of a row has
                begun in this shard.
            apply: (transition, S) -> S.
        """
        packed_PBX = self.group.gather(torch.cat([local_BHvKV.flatten(1), transition.flatten(1)], 1))
        local_PBX, transition_PBX = packed_PBX.split([x[0].numel() for x in (local_BHvKV, transition)], 2)
        local_PBHvKV = local_PBX.unflatten(2, local_BHvKV.shape[1:])
        transition_PB = transition_PBX.unflatten(2, transition.shape[1:])
        # Zeros that depend on the gather, whose backward is a collective that every process must join.
        state = local_PBHvKV[:0].sum(0)
        with torch.autocast(state.device.type, enabled=False):
            for earlier in range(self.group.rank):
                state = apply(transition_PB[earlier], state) + local_PBHvKV[earlier]
        return torch.where(self.continues_B[:, None, None, None], state, 0.0)


def _borders_between(borders: CuSeqlens, length: int, begin: int, end: int) -> CuSeqlens:
    """The borders inside columns begin .. end - 1 of rows of `length` tokens, counted over these columns alone."""
    inside = [0]
    for start, stop in zip(borders.host, borders.host[1:], strict=False):
        first = start % length
        kept = min(first + stop - start, end) - max(first, begin)
        if kept > 0:
            inside.append(inside[-1] + kept)
    return CuSeqlens(inside, borders.device)
