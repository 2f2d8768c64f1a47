"""The indexer's scores and the exact choice of the best keys, as Triton kernels.

Scores of a block of queries go to a strip in a work buffer; a row of it is read five times: four passes count digits
of the scores (radix selection), the fifth writes the chosen positions in ascending order.

B rows, T queries (the last T positions), S keys, J index heads, I index dim, N selected keys a query, Q queries of a
block, X keys that a block may see, of which `low` is the first.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.triton_support import CompileCase, tuned

STRIP_ELEMENTS = 2**24  # scores per block of queries, fp32: 64 MiB
MIN_BLOCK_QUERIES = 64


@tuned([triton.Config({"BLOCK_T": 64, "BLOCK_S": 64}, num_warps=4, num_stages=2),
        triton.Config({"BLOCK_T": 64, "BLOCK_S": 128}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 128, "BLOCK_S": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 64, "BLOCK_S": 256}, num_warps=8, num_stages=3)], key=["J", "I", "KEYS"])
@triton.jit(do_not_specialize=["Q", "start", "low"])
def index_scores(q_ptr, k_ptr, w_ptr, first_ptr, score_ptr, T, S, Q, start, low, stride, num_first, num_local, J,
                 KEYS: tl.constexpr, I: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
                 BLOCK_S: tl.constexpr):
    """score[b, t - start, s - low] = sum_j w_tj relu(q_tj . k_s), where a tile holds any visible pair.

    KEYS: as unsigned integers in the order of the scores, -0 equal to 0, the greatest for keys always selected.
    """
    b = tl.program_id(2).to(tl.int64)
    begin_t = tl.program_id(1) * BLOCK_T
    begin_s = low + tl.program_id(0) * BLOCK_S
    rest = tl.minimum(Q - begin_t, BLOCK_T)
    if begin_s > S - T + start + begin_t + rest - 1:
        return
    if begin_s + BLOCK_S <= tl.load(first_ptr + b * T + start + begin_t):
        return
    row, i = begin_t + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_I)
    s = begin_s + tl.arange(0, BLOCK_S)
    token = b * T + start + row.to(tl.int64)
    k = tl.load(k_ptr + (b * S + s)[:, None] * I + i[None, :], mask=(s < S)[:, None] & (i < I)[None, :], other=0.0)
    score = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
    for j in range(J):
        at = token * J + j
        q = tl.load(q_ptr + at[:, None] * I + i[None, :], mask=(row < Q)[:, None] & (i < I)[None, :], other=0.0)
        w = tl.load(w_ptr + at, mask=row < Q, other=0.0).to(tl.float32)
        score += w[:, None] * tl.maximum(tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
    at = score_ptr + (b * Q + row)[:, None] * stride + (s - low)[None, :]
    inside = (row < Q)[:, None] & (s < S)[None, :]
    if KEYS:
        first = tl.load(first_ptr + token, mask=row < Q, other=0)
        bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
        key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        always = (s[None, :] < first[:, None] + num_first) | (s[None, :] > S - T + start + row[:, None] - num_local)
        score = tl.where(always, 0xFFFFFFFF, key).to(tl.uint32).to(tl.float32, bitcast=True)
    tl.store(at, score, mask=inside)


@triton.jit(do_not_specialize=["Q", "start", "low"])
def _select(key_ptr, first_ptr, count_ptr, out_ptr, T, S, Q, start, low, stride, N, COUNTS: tl.constexpr,
            BLOCK: tl.constexpr):
    """The N (with COUNTS: as many as listed there) visible positions of greatest key of one query, ascending."""
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    last = S - T + start + row
    first = tl.load(first_ptr + b * T + start + row)
    line = key_ptr + (b * Q + row) * stride - low
    lanes, bins = tl.arange(0, BLOCK), tl.arange(0, 256)
    wanted = N
    if COUNTS:
        wanted = tl.load(count_ptr + b * Q + row)
    wanted = tl.minimum(wanted, last + 1 - first)
    missing = wanted
    threshold = tl.zeros([1], dtype=tl.uint32)  # the least key chosen, its leading digits so far
    known = tl.zeros([1], dtype=tl.uint32)  # ones at these digits
    for step in tl.static_range(4):
        count = tl.zeros([256], dtype=tl.int32)
        for begin in range(first, last + 1, BLOCK):
            s = begin + lanes
            key = tl.load(line + s, mask=s <= last, other=0.0).to(tl.uint32, bitcast=True)
            digit = ((key >> (24 - 8 * step)) & 255).to(tl.int32)
            count += tl.histogram(digit, 256, mask=(s <= last) & ((key & known) == threshold))
        reached = tl.cumsum(count, 0, reverse=True)  # keys of this digit or a greater one
        here = (reached >= missing) & (reached - count < missing)
        threshold |= tl.sum(tl.where(here, bins, 0)).to(tl.uint32) << (24 - 8 * step)
        missing -= tl.sum(tl.where(here, reached - count, 0))
        known |= tl.full([1], 255, tl.uint32) << (24 - 8 * step)
    greater_before, equal_before = 0, 0
    for begin in range(first, last + 1, BLOCK):
        s = begin + lanes
        key = tl.load(line + s, mask=s <= last, other=0.0).to(tl.uint32, bitcast=True)
        greater, equal = (s <= last) & (key > threshold), (s <= last) & (key == threshold)
        # counted together, in halves of an integer: a block has fewer than 2^15 of each
        kinds = greater.to(tl.int32) + (equal.to(tl.int32) << 16)
        both = tl.cumsum(kinds, 0)
        equals = equal_before + (both >> 16)
        place = greater_before + (both & 0xFFFF) + tl.minimum(equals, missing)
        tl.store(out_ptr + (b * T + start + row) * N + place - 1, s,
                 mask=(greater | (equal & (equals <= missing))) & (place <= wanted))
        total = tl.sum(kinds)
        greater_before += total & 0xFFFF
        equal_before += total >> 16


class Strips:
    """Blocks of queries with a work buffer for a number of each visible pair: linear in S, whatever T is.

    `first_BT`: the first key that each query sees.
    """

    def __init__(self, batch: int, queries: int, keys: int, cu_seqlens: CuSeqlens | None, device: torch.device):
        self.batch, self.queries, self.keys, self.cu_seqlens = batch, queries, keys, cu_seqlens
        self.first_BT = torch.zeros(batch, queries, dtype=torch.int32, device=device)
        if cu_seqlens is not None:
            self.first_BT = cu_seqlens.first_keys(batch, queries).int().contiguous()
        size = STRIP_ELEMENTS // (batch * keys) // MIN_BLOCK_QUERIES * MIN_BLOCK_QUERIES
        self.size = min(max(MIN_BLOCK_QUERIES, size), queries)

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (first query, number of queries, first key, number of keys) of each block."""
        for start in range(0, self.queries, self.size):
            size = min(self.size, self.queries - start)
            low = self._first_key(start)
            yield start, size, low, self.keys - self.queries + start + size - low

    def _first_key(self, query: int) -> int:
        """The first key seen by this or a later query of any row."""
        if self.cu_seqlens is None:
            return 0
        host, rows = self.cu_seqlens.host, range(0, self.batch * self.keys, self.keys)
        place = self.keys - self.queries + query
        return min(host[bisect.bisect_right(host, row + place) - 1] - row for row in rows)

    def buffer(self) -> Tensor:
        """An fp32 work buffer, large enough for any block."""
        stride = _stride(self.keys)
        return torch.empty(self.batch * self.size * stride, dtype=torch.float32, device=self.first_BT.device)


def strip(buffer: Tensor, batch: int, size: int, width: int) -> Tensor:
    """A view [B, Q, X] of a buffer, with rows a multiple of 64 bytes apart."""
    stride = _stride(width)
    return buffer[: batch * size * stride].view(batch, size, stride)[..., :width]


def _stride(width: int) -> int:
    return triton.cdiv(width, 16) * 16


def write_index_scores(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, strips: Strips, start: int, low: int,
                       out_BQX: Tensor, always: tuple[int, int] | None = None) -> None:
    """Scores of the visible pairs of a block; other pairs are left undefined.

    `always`: numbers of first and last keys always selected; then the bits are keys for `select`, not numbers.
    """
    batch, queries, heads, dim = q_BTJI.shape
    size, width = out_BQX.shape[1:]
    num_first, num_local = always or (0, 0)
    index_scores[lambda meta: (triton.cdiv(width, meta["BLOCK_S"]), triton.cdiv(size, meta["BLOCK_T"]), batch)](
        q_ptr=q_BTJI, k_ptr=k_BSI, w_ptr=w_BTJ, first_ptr=strips.first_BT, score_ptr=out_BQX, T=queries,
        S=k_BSI.shape[1], Q=size, start=start, low=low, stride=out_BQX.stride(1), num_first=num_first,
        num_local=num_local, J=heads, KEYS=always is not None, I=dim, BLOCK_I=max(16, triton.next_power_of_2(dim)))


def select(key_BQX: Tensor, strips: Strips, start: int, low: int, out_BTN: Tensor,
           counts_BQ: Tensor | None = None) -> None:
    """Writes the chosen positions of a block of queries to the front of their rows in `out`.

    The bits of `key` (fp32) are compared as unsigned integers; numbers that are not negative are their own keys.
    """
    batch, size, width = key_BQX.shape
    _select[(size, batch)](
        key_ptr=key_BQX, first_ptr=strips.first_BT, count_ptr=strips.first_BT if counts_BQ is None else counts_BQ,
        out_ptr=out_BTN, T=strips.queries, S=strips.keys, Q=size, start=start, low=low, stride=key_BQX.stride(1),
        N=out_BTN.shape[2], COUNTS=counts_BQ is not None, BLOCK=min(1024, max(64, triton.next_power_of_2(width))))


def index_tensors(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Makes q, k and w contiguous, and q and k of one dtype, as the kernels read them."""
    dtype = torch.promote_types(q_BTJI.dtype, k_BSI.dtype)
    return q_BTJI.to(dtype).contiguous(), k_BSI.to(dtype).contiguous(), w_BTJ.contiguous()


def indexer_topk(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, topk: int, cu_seqlens: CuSeqlens | None = None,
                 num_first: int = 0, num_local: int = 0) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    batch, queries = q_BTJI.shape[:2]
    strips = Strips(batch, queries, k_BSI.shape[1], cu_seqlens, q_BTJI.device)
    out_BTN = torch.full((batch, queries, topk), -1, dtype=torch.int32, device=q_BTJI.device)
    index = index_tensors(q_BTJI, k_BSI, w_BTJ)
    buffer = strips.buffer()
    for start, size, low, width in strips.blocks():
        key_BQX = strip(buffer, batch, size, width)
        write_index_scores(*index, strips, start, low, key_BQX, (num_first, num_local))
        select(key_BQX, strips, start, low, out_BTN)
    return out_BTN


_INTEGERS = dict.fromkeys(("T", "S", "Q", "start", "low", "stride"), "i32")
_SCORES = _INTEGERS | {"q_ptr": "*bf16", "k_ptr": "*bf16", "w_ptr": "*fp32", "first_ptr": "*i32", "score_ptr": "*fp32",
                       "num_first": "i32", "num_local": "i32", "J": "i32"}
COMPILE_CASES = [
    *(CompileCase(f"index scores 64 x 128{' as keys' if keys else ''}", index_scores, _SCORES,
               {"KEYS": keys, "I": 128, "BLOCK_I": 128}, ("stride",)) for keys in (True, False)),
    CompileCase("top-k of a row", _select,
             _INTEGERS | {"key_ptr": "*fp32", "first_ptr": "*i32", "count_ptr": "*i32", "out_ptr": "*i32", "N": "i32"},
             {"COUNTS": False, "BLOCK": 1024}, ("stride",)),
]
