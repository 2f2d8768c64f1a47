"""Sums over the queries that chose a key, without atomics: for each key, the list of its entries in the selections.

A block of Q queries lists N keys each; place n of query q is row q * N + n of what is to be added up. A table says
where a query lists a key, which makes the lists by counting down its columns, always in the order of the queries.

S keys, W columns, C the most places a key can have (Q, as a query lists a key once).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.triton_support import CompileCase

WORK_BUFFER_BYTES = 2**30  # per block of queries
MIN_BLOCK_QUERIES = 16  # whatever memory they need


@triton.jit
def _mark(index_ptr, table_ptr, S, N, BLOCK_N: tl.constexpr):
    """table[q, s] = the row in which query q has key s."""
    q = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.load(index_ptr + q.to(tl.int64) * N + n, mask=n < N, other=-1)
    tl.store(table_ptr + q.to(tl.int64) * S + s, q * N + n, mask=s >= 0)


@triton.jit(do_not_specialize=["Q"])
def _compact(table_ptr, list_ptr, count_ptr, S, Q, C, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """The entries of each column of the table that are not -1, one after the other."""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    count = tl.zeros([BLOCK_S], dtype=tl.int32)
    for begin in range(0, Q, BLOCK_Q):
        q = begin + tl.arange(0, BLOCK_Q)
        row = tl.load(table_ptr + q.to(tl.int64)[:, None] * S + s[None, :],
                      mask=(q < Q)[:, None] & (s < S)[None, :], other=-1)
        there = (row >= 0).to(tl.int32)
        place = count[None, :] + tl.cumsum(there, 0) - 1
        tl.store(list_ptr + s.to(tl.int64)[None, :] * C + place, row, mask=row >= 0)
        count += tl.sum(there, 0)
    tl.store(count_ptr + s, count, mask=s < S)


@triton.jit
def _add_rows(row_ptr, list_ptr, count_ptr, total_ptr, C, W, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """total[s] += the rows in the list of key s."""
    s = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + s)
    if count == 0:
        return
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    place = tl.arange(0, BLOCK_P)
    part = tl.zeros([BLOCK_P, BLOCK_W], dtype=tl.float32)
    for begin in range(0, count, BLOCK_P):
        inside = begin + place < count
        row = tl.load(list_ptr + s * C + begin + place, mask=inside, other=0).to(tl.int64)
        part += tl.load(row_ptr + row[:, None] * W + w[None, :], mask=inside[:, None] & (w < W)[None, :],
                        other=0.0).to(tl.float32)
    at = total_ptr + s * W + w
    tl.store(at, tl.load(at, mask=w < W, other=0.0) + tl.sum(part, 0), mask=w < W)


class InverseLists:
    """For each of S keys, the rows (query times N plus place) of `indices` [Q, N] that name it, ascending.

    Memory: 8 S Q bytes. Nothing waits for the device.
    """

    def __init__(self, indices_QN: Tensor, keys: int):
        queries, listed = indices_QN.shape
        self.most, device = queries, indices_QN.device
        table_QS = torch.full((queries, keys), -1, dtype=torch.int32, device=device)
        self.lists_SC = torch.empty(keys, queries, dtype=torch.int32, device=device)
        self.counts_S = torch.empty(keys, dtype=torch.int32, device=device)
        _mark[(queries, triton.cdiv(listed, 1024))](
            index_ptr=indices_QN, table_ptr=table_QS, S=keys, N=listed, BLOCK_N=1024)
        _compact[(triton.cdiv(keys, 64),)](
            table_ptr=table_QS, list_ptr=self.lists_SC, count_ptr=self.counts_S, S=keys, Q=queries, C=queries,
            BLOCK_Q=32, BLOCK_S=64)

    def add(self, rows_MW: Tensor, total_SW: Tensor) -> None:
        """total[s] += the sum of its rows, in a fixed order. Rows that no list names may hold anything."""
        columns = total_SW.shape[1]
        block = min(256, max(16, triton.next_power_of_2(columns)))
        _add_rows[(len(total_SW), triton.cdiv(columns, block))](
            row_ptr=rows_MW, list_ptr=self.lists_SC, count_ptr=self.counts_S, total_ptr=total_SW, C=self.most,
            W=columns, BLOCK_P=16, BLOCK_W=block)


def queries_per_block(queries: int, keys: int, bytes_per_query: int) -> int:
    """Queries per block, so that gradients of list entries (`bytes_per_query`) and inverse lists fit the buffers."""
    affordable = WORK_BUFFER_BYTES // (bytes_per_query + 8 * keys)
    return min(queries, max(MIN_BLOCK_QUERIES, affordable // MIN_BLOCK_QUERIES * MIN_BLOCK_QUERIES))


COMPILE_CASES = [
    CompileCase("inverse lists: table", _mark, {"index_ptr": "*i32", "table_ptr": "*i32", "S": "i32", "N": "i32"},
             {"BLOCK_N": 1024}),
    CompileCase("inverse lists: compact", _compact,
             {"table_ptr": "*i32", "list_ptr": "*i32", "count_ptr": "*i32", "S": "i32", "Q": "i32", "C": "i32"},
             {"BLOCK_Q": 32, "BLOCK_S": 64}),
    CompileCase("inverse lists: sums", _add_rows,
             {"row_ptr": "*bf16", "list_ptr": "*i32", "count_ptr": "*i32", "total_ptr": "*fp32", "C": "i32",
              "W": "i32"}, {"BLOCK_P": 16, "BLOCK_W": 256}, ("W",)),
]
