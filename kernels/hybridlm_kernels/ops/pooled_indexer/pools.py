"""Pools of consecutive tokens: their places in a batch, and those that a query sees.

B rows, T queries (the last T positions), S tokens per row, P pools per row, M selected pools, N listed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens


@dataclass(eq=False)
class Pools:
    """Runs of `size` tokens, counted from the start of each document; a shorter run at its end is no pool.

    A query sees the pools of its document that are complete: those whose last token is not later than the query. The
    tokens behind the last of these, up to the query, are its open tail (none where a pool ends with the query).

    start_BP: first token of each pool; rows with fewer pools end with 0, which no query counts as its own.
    first_BT, count_BT: the first pool of the query's document, and how many of this document it sees.
    begin_BT: the first token of the document.

    >>> pools = Pools.of(1, 5, 5, 2, torch.device("cpu"))
    >>> pools.members(), pools.count_BT
    (tensor([[[0, 1],
             [2, 3]]]), tensor([[0, 1, 1, 2, 2]]))
    """

    size: int
    start_BP: Tensor
    first_BT: Tensor
    count_BT: Tensor
    begin_BT: Tensor
    keys: int

    @classmethod
    def of(cls, batch: int, queries: int, keys: int, size: int, device: torch.device,
           cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None) -> Pools:
        """The pools of rows of `keys` tokens for the last `queries` of them.

        Raises:
            ValueError: borders that do not cover the rows.
        """
        if cu_seqlens is None:
            position_BT = torch.arange(keys - queries, keys, device=device).expand(batch, queries)
            start_BP = torch.arange(max(1, keys // size), device=device).mul_(size).expand(batch, -1)
            zero_BT = torch.zeros_like(position_BT)
            return cls(size, start_BP, zero_BT, (position_BT + 1) // size, zero_BT, keys)
        cu_seqlens = CuSeqlens.of(cu_seqlens, device).filled
        cu_seqlens.check(batch, keys)
        if torch.compiler.is_dynamo_compiling():
            return cls._traced(batch, queries, keys, size, cu_seqlens)
        key = ("pools", size, batch, queries)
        if key not in cu_seqlens.cache:
            cu_seqlens.cache[key] = cls._packed(batch, queries, keys, size, cu_seqlens)
        return cu_seqlens.cache[key]

    @classmethod
    def _packed(cls, batch: int, queries: int, keys: int, size: int, cu_seqlens: CuSeqlens) -> Pools:
        starts: list[list[int]] = [[] for _ in range(batch)]
        firsts = []
        for border, length in zip(cu_seqlens.host, cu_seqlens.lengths, strict=False):
            row, begin = divmod(border, keys)
            firsts.append(len(starts[row]))
            starts[row] += [begin + size * pool for pool in range(length // size)]
        most = max(1, *map(len, starts)) if batch > 1 else max(1, len(starts[0]))
        device, position_BT = cu_seqlens.device, cu_seqlens.positions().view(batch, keys)[:, -queries:]
        start_BP = torch.tensor([row + [0] * (most - len(row)) for row in starts], device=device)
        first_BT = torch.tensor(firsts, device=device)[cu_seqlens.document_ids()].view(batch, keys)[:, -queries:]
        return cls(size, start_BP, first_BT, (position_BT + 1) // size, cu_seqlens.first_keys(batch, queries), keys)

    @classmethod
    def _traced(cls, batch: int, queries: int, keys: int, size: int, cu_seqlens: CuSeqlens) -> Pools:
        """The same pools from tensors alone, for torch.compile; rows have room for as many as fit into them."""
        device, position_BS = cu_seqlens.device, cu_seqlens.positions().view(batch, keys)
        end_BS = cu_seqlens.ends()[cu_seqlens.document_ids()].view(batch, keys)
        token_BS = torch.arange(batch * keys, device=device).view(batch, keys)
        starts_BS = (position_BS % size == 0) & (token_BS + size <= end_BS)
        before_BS = starts_BS.cumsum(1) - starts_BS.long()  # pools of the row that start before the token
        most = max(1, keys // size)
        column_S = torch.arange(keys, device=device).expand(batch, keys)
        start_BP = column_S.new_zeros(batch, most + 1).scatter(1, before_BS.masked_fill(~starts_BS, most), column_S)
        begin_BS = column_S - position_BS
        first_BS = before_BS.gather(1, begin_BS)
        return cls(size, start_BP[:, :most], first_BS[:, -queries:], (position_BS[:, -queries:] + 1) // size,
                   begin_BS[:, -queries:], keys)

    @property
    def number(self) -> int:
        """Pools per row, P."""
        return self.start_BP.shape[1]

    def members(self) -> Tensor:
        """Tokens of each pool, int64 [B, P, size], inside the row also where a pool is missing."""
        offset = torch.arange(self.size, device=self.start_BP.device)
        return (self.start_BP[..., None] + offset).clamp_(max=self.keys - 1)

    def visible(self, rows: slice, stop: int | None = None) -> Tensor:
        """Mask [B, Q, P] of the pools, among the first `stop`, that the queries `rows` see."""
        pool_P = torch.arange(self.number, device=self.start_BP.device)[:stop]
        first = self.first_BT[:, rows, None]
        return (pool_P >= first) & (pool_P < first + self.count_BT[:, rows, None])

    def tokens(self, pools_BTM: Tensor) -> Tensor:
        """Tokens of each query's pools (-1 for none), then its open tail, int32 [B, T, M * size + size - 1]."""
        offset = torch.arange(self.size, device=pools_BTM.device)
        start_BTM = self.start_BP.gather(1, pools_BTM.clamp(min=0).flatten(1).long()).view(pools_BTM.shape)
        inside = torch.where(pools_BTM[..., None] < 0, -1, start_BTM[..., None] + offset).flatten(2)
        tail_BT1 = (self.begin_BT + self.size * self.count_BT)[..., None]
        tail = tail_BT1 + offset[:-1]
        last_T1 = torch.arange(self.keys - pools_BTM.shape[1], self.keys, device=pools_BTM.device)[:, None]
        return torch.cat([inside, tail.masked_fill(tail > last_T1, -1)], -1).int()

    def selected(self, tokens_BTN: Tensor) -> Tensor:
        """Pools of a list that `tokens` made, -1 for none, int64 [B, T, M]."""
        start_BTM = tokens_BTN[..., : tokens_BTN.shape[-1] - self.size + 1 : self.size].long()
        pool_BTM = self.first_BT[..., None] + (start_BTM - self.begin_BT[..., None]) // self.size
        return pool_BTM.masked_fill(start_BTM < 0, -1)
