"""Context parallelism: long rows divided into shards, one per process, and what a layer may ask of the others.

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

    All of them make the same calls in the same order, forward and, since gradients travel back, backward: whatever
    `gather`, `exchange` and `from_previous` return must enter the loss everywhere, if only as zeros.
    """

    rank: int  # which shard is here
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """[P, ...]: everyone's x, in order."""

    def exchange(self, x_P: Tensor) -> Tensor:
        """[P, ...]: entry j goes to shard j, entry i of the result comes from shard i."""

    def from_previous(self, x: Tensor) -> Tensor:
        """The x of the shard before; zeros in the first."""

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum of everyone's x. No gradient."""


@dataclass(eq=False)
class RowShard:
    """Tokens rank*L .. rank*L + L - 1 of each of B rows.

    `borders`: of the documents of the whole rows, or None where each row is one document. `local_borders`: of what is
    here of them. `positions_BL`: places in the documents, which may have begun in earlier shards.
    """

    group: ShardGroup
    length: int  # L
    positions_BL: Tensor
    borders: CuSeqlens | None
    local_borders: CuSeqlens | None

    @classmethod
    def of(cls, group: ShardGroup, positions_BT: Tensor, borders: CuSeqlens | None) -> RowShard:
        """This process's shard of rows with these documents.

        Raises:
            ValueError: rows that do not divide into shards.
        """
        length = positions_BT.shape[1]
        if length % group.size:
            raise ValueError(f"rows of {length} tokens cannot be cut into {group.size} equal shards")
        each = length // group.size
        begin = group.rank * each
        own = None if borders is None else _cut(borders, length, begin, begin + each)
        return cls(group, each, positions_BT[:, begin : begin + each], borders, own)

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        """The tokens held here, from all tokens of the rows [B, T, ...]."""
        return x_BT.unflatten(1, (self.group.size, self.length))[:, self.group.rank]

    @cached_property
    def longest_document(self) -> int:
        """Of the whole rows: all shards decide alike what depends on it."""
        return self.group.size * self.length if self.borders is None else max(self.borders.lengths)

    def documents(self) -> tuple[Tensor, int]:
        """Which document of the whole rows each token here is of, int64 [B * L], and how many there are."""
        if self.borders is None:
            batch = self.positions_BL.shape[0]
            return torch.arange(batch, device=self.positions_BL.device).repeat_interleave(self.length), batch
        ids_BT = self.borders.document_ids().view(self.positions_BL.shape[0], -1)
        return self.local_tokens(ids_BT).flatten(), self.borders.num_documents

    def weighted_mean(self, mean: Tensor, count: Tensor) -> Tensor:
        """The mean over `count` things of this shard, weighed so that the average over shards is that over all things;
        as it is where there are none anywhere."""
        total = self.group.all_sum(count)
        return torch.where(total > 0, mean * count.to(mean.dtype) * self.group.size / total.clamp(min=1), mean)

    # All tokens, a share of the heads

    def by_heads(self, *xs_BLHK: Tensor) -> list[Tensor]:
        """[B, T, H / P, K] of each tensor [B, L, H, K]: one exchange for all of them. P divides H."""
        size, shapes = self.group.size, [(x.shape[0], self.length, x.shape[2] // self.group.size, x.shape[3])
                                         for x in xs_BLHK]
        sent_PX = torch.cat([x.unflatten(2, (size, -1)).movedim(2, 0).flatten(1) for x in xs_BLHK], 1)
        parts = self.group.exchange(sent_PX).split([math.prod(shape) for shape in shapes], 1)
        return [part.unflatten(1, shape).movedim(0, 1).flatten(1, 2) for part, shape in zip(parts, shapes, strict=True)]

    def by_tokens(self, x_BTHK: Tensor) -> Tensor:
        """Back: [B, L, H, K] of [B, T, H / P, K]."""
        sent_PBLHK = x_BTHK.unflatten(1, (self.group.size, self.length)).movedim(1, 0)
        return self.group.exchange(sent_PBLHK).movedim(0, 2).flatten(2, 3)

    def local_heads(self, x_H: Tensor) -> Tensor:
        """[H / P]: the heads that `by_heads` brings here, of what every process has for all of them."""
        return x_H.unflatten(0, (self.group.size, -1))[self.group.rank]

    # Small tensors of all tokens before

    def all_tokens(self, x_BL: Tensor) -> Tensor:
        """All tokens of the rows [B, T, ...], those of the other shards included."""
        return self.group.gather(x_BL).movedim(0, 1).flatten(1, 2)

    def history(self, x_BL: Tensor) -> Tensor:
        """[B, S, ...]: the tokens up to the end of this shard."""
        return self.all_tokens(x_BL)[:, : self.history_length]

    @property
    def history_length(self) -> int:
        """S."""
        return (self.group.rank + 1) * self.length

    @cached_property
    def history_borders(self) -> CuSeqlens | None:
        """Of the documents, as far as `history` holds them."""
        if self.borders is None:
            return None
        return _cut(self.borders, self.group.size * self.length, 0, self.history_length)

    # What crosses the border from the left

    def tail(self, x_BLD: Tensor, tokens: int) -> Tensor:
        """[B, tokens, D]: those just before the shard; zero where they are of another document."""
        tail_BWD = self.group.from_previous(x_BLD[:, self.length - tokens :])
        distance_W = torch.arange(tokens, 0, -1, device=x_BLD.device)
        return torch.where((distance_W <= self.positions_BL[:, :1])[..., None], tail_BWD, 0.0)

    @property
    def continues_B(self) -> Tensor:
        """bool: whether the first document of each row has begun in an earlier shard."""
        return self.positions_BL[:, 0] > 0

    def at_start(self, x_B: Tensor) -> Tensor:
        """[N, ...]: x for the first document of each row, zeros for those that begin here."""
        if self.local_borders is None:
            return x_B
        room = x_B.new_zeros(self.local_borders.num_documents, *x_B.shape[1:])
        return room.index_copy(0, self._document_at(0), x_B)

    def at_end(self, x_N: Tensor) -> Tensor:
        """[B, ...]: x of the last document of each row."""
        return x_N if self.local_borders is None else x_N.index_select(0, self._document_at(self.length - 1))

    def _document_at(self, place: int) -> Tensor:
        """int64 [B]: the document of that token of each row."""
        assert self.local_borders is not None
        return self.local_borders.document_ids().view(-1, self.length)[:, place]

    def first_document(self) -> Tensor:
        """bool [B, L]: the tokens of documents that have begun in an earlier shard."""
        step_L = torch.arange(self.length, device=self.positions_BL.device)
        start_B1 = self.positions_BL[:, :1]
        return (self.positions_BL == start_B1 + step_L) & (start_B1 > 0)

    def incoming(self, local_BHvKV: Tensor, through: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The state [B, HV, K, V] at the start of the shard, by one gather of what each shard does to a state S:

            S -> apply(through, S) + local

        `local`: the state at the end, from zero at the start. `through` [B, HV, ...] is zero where the last document
        of a row does not come from the left.
        """
        packed_PBX = self.group.gather(torch.cat([local_BHvKV.flatten(1), through.flatten(1)], 1))
        local_PBX, through_PBX = packed_PBX.split([x[0].numel() for x in (local_BHvKV, through)], 2)
        local_PBHvKV = local_PBX.unflatten(2, local_BHvKV.shape[1:])
        through_PB = through_PBX.unflatten(2, through.shape[1:])
        state = local_PBHvKV[:0].sum(0)  # zeros, but the gather's backward waits for everyone
        with torch.autocast(state.device.type, enabled=False):
            for earlier in range(self.group.rank):
                state = apply(through_PB[earlier], state) + local_PBHvKV[earlier]
        return torch.where(self.continues_B[:, None, None, None], state, 0.0)


def _cut(borders: CuSeqlens, length: int, begin: int, end: int) -> CuSeqlens:
    """The borders inside columns begin .. end - 1 of rows of `length` tokens, counted over these columns alone."""
    inside = [0]
    for start, stop in zip(borders.host, borders.host[1:], strict=False):
        first = start % length
        kept = min(first + stop - start, end) - max(first, begin)
        if kept > 0:
            inside.append(inside[-1] + kept)
    return CuSeqlens(inside, borders.device)
