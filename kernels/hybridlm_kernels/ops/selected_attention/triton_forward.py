"""The forward kernels of attention over listed blocks, and the sets of keys that they go over.

Letters as in `triton_backend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.selected_attention.triton_tiles import Documents, KeySet, Pairs
from hybridlm_kernels.ops.sparse_attention.triton_backend import LOG2_E
from hybridlm_kernels.ops.sparse_attention.triton_inverse import MIN_BLOCK_QUERIES, WORK_BUFFER_BYTES
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.triton_tiles import LOG2_E as LOG2_E_IN_KERNELS
from hybridlm_kernels.triton_support import CompileCase, dtype_of_tiles, tuned

OF_THE_BATCH = ["start", "T", "S", "offset", "hidden", "window", "N", "U", "place", "width"]
TUNING_KEY = ["H", "G", "K", "V", "HEADS"]
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (2, 1)]


@triton.jit
def load_bias(bias_ptr, pair, inside, start, U, N):
    """Biases of pairs of a query and a block that it lists, for exponentials of base 2."""
    return tl.load(bias_ptr + tl.cast(start, tl.int64) * U * N + pair, mask=inside, other=0.0) * LOG2_E_IN_KERNELS


@triton.jit
def load_gathered(ptr, offset, inside, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Loads [rows, PADDED] at element offsets of rows, zeros outside."""
    column = tl.arange(0, PADDED)
    return tl.load(ptr + offset[:, None] + column[None, :], mask=inside[:, None] & (column < COLUMNS)[None, :],
                   other=0.0)


@triton.jit
def store_gathered(ptr, offset, inside, value, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Stores [rows, PADDED] where `load_gathered` loads it."""
    column = tl.arange(0, PADDED)
    tl.store(ptr + offset[:, None] + column[None, :], value.to(ptr.dtype.element_ty),
             mask=inside[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def rows_of_tile(order_ptr, begin, end, axis, first_head, start, T, offset, N, U, HEADS: tl.constexpr,
                 ROW_HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of a tile: pair, query in its piece, query, head, position of the query, and whether there is a row."""
    row = tl.arange(0, BLOCK_M)
    place = row // ROW_HEADS
    in_pair = first_head + row % ROW_HEADS
    inside = (begin + place < end) & (place < BLOCK_M // ROW_HEADS) & (in_pair < HEADS)
    pair = tl.load(order_ptr + tl.cast(begin, tl.int64) + place, mask=inside, other=0)
    local = (pair // (U * N)).to(tl.int64)
    head = (pair // N % U + axis).to(tl.int64) * HEADS + in_pair
    token = tl.cast(start, tl.int64) + local
    return pair, local, token, head, offset + (token % T).to(tl.int32), inside


@triton.jit
def block_of_tile(tiles_ptr, order_ptr, blocks_ptr, axis, start, T, S, N, U, H, G, HEADS: tl.constexpr):
    """First pair and end of a tile, then its block: the first key over all rows, the same in its row, the number of
    keys, and the key head.
    """
    at = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    block, begin, end = tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)
    pair = tl.load(order_ptr + tl.cast(begin, tl.int64))
    row = (tl.cast(start, tl.int64) + pair // (U * N)) // T
    first = tl.load(blocks_ptr + block * 2)
    keys = (tl.load(blocks_ptr + block * 2 + 1) - first).to(tl.int32)
    g = (pair // N % U + axis).to(tl.int64) * HEADS // (H // G)
    return begin, end, first, (first - row * S).to(tl.int32), keys, g


@triton.jit
def seen_range(t, inside, first, keys, hidden, window):
    """First and last key of the block that each row sees, and those of all rows; the last is -1 where none is."""
    last = tl.where(inside, tl.minimum(t - hidden - first, keys - 1), -1)
    least = t - t
    if window is not None:
        least = tl.maximum(t - window + 1 - first, 0)
    return least, last, tl.min(tl.where(inside, least, keys), 0), tl.max(last, 0)


@tuned(CONFIGS, key=TUNING_KEY)
@triton.jit(do_not_specialize=OF_THE_BATCH)
def forward_kernel(q_ptr, k_ptr, v_ptr, tiles_ptr, order_ptr, blocks_ptr, bias_ptr, part_ptr, part_lse_ptr, scale,
                   start, T, S, offset, hidden, window, N, U, place, width, H, G, K: tl.constexpr, V: tl.constexpr,
                   K0: tl.constexpr, V0: tl.constexpr, HEADS: tl.constexpr, ROW_HEADS: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Attention of the rows of a tile to their block alone: outputs, and the log2 of the sums of exp2. `scale` includes
    log2 e.
    """
    head_tiles: tl.constexpr = (HEADS + ROW_HEADS - 1) // ROW_HEADS
    axis, first_head = tl.program_id(1) // head_tiles, tl.program_id(1) % head_tiles * ROW_HEADS
    begin, end, key, first, keys, g = block_of_tile(tiles_ptr, order_ptr, blocks_ptr, axis, start, T, S, N, U, H, G,
                                                    HEADS)
    if begin >= end:
        return
    pair, local, token, h, t, inside = rows_of_tile(order_ptr, begin, end, axis, first_head, start, T, offset, N, U,
                                                    HEADS, ROW_HEADS, BLOCK_M)
    least, last, low, high = seen_range(t, inside, first, keys, hidden, window)
    q = load_gathered(q_ptr, (token * H + h) * K, inside, K, K0)
    bias = tl.zeros([BLOCK_M], tl.float32)
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, pair, inside, start, U, N)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, V0], tl.float32)
    for at in tl.range(low - low % BLOCK_C, high + 1, BLOCK_C, disable_licm=True):
        c = at + tl.arange(0, BLOCK_C)
        row = (key + c) * G + g
        k = load_gathered(k_ptr, row * K, c < keys, K, K0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[:, None]
        seen = c[None, :] <= last[:, None]
        if window is not None:
            seen = seen & (c[None, :] >= least[:, None])
        score = tl.where(seen, score, float("-inf"))
        above = tl.maximum(most, tl.max(score, 1))
        pivot = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2(score - pivot[:, None])
        shrink = tl.exp2(most - pivot)
        v = load_gathered(v_ptr, row * V, c < keys, V, V0)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        most = above
    some = total > 0
    to = (local * H + h) * width + place + pair % N
    store_gathered(part_ptr, to * V, inside, o / tl.where(some, total, 1.0)[:, None], V, V0)
    tl.store(part_lse_ptr + to, tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=inside)


@triton.jit
def rows_of_parts(rows, U, H, ROWS: tl.constexpr):
    """Rows (query and head) of a program that adds up parts, whether they exist, their heads and their lists."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = row % H
    return row, row < rows, h, row // H * U + h // (H // U)


@triton.jit
def load_part_lse(part_lse_ptr, there_ptr, row, lists, inside, w, width):
    """The log2 of the sum of exp2 of some parts, -inf where there are none."""
    there = tl.load(there_ptr + lists * width + w, mask=inside, other=0) != 0
    return tl.load(part_lse_ptr + row * width + w, mask=there, other=float("-inf"))


@triton.jit(do_not_specialize=["start", "rows", "width", "U"])
def join_kernel(part_ptr, part_lse_ptr, there_ptr, sinks_ptr, o_ptr, lse_ptr, start, rows, width, U, H,
                V: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr):
    """o and the log2 of the sum of exp2 of queries and heads, from their parts and sinks."""
    row, inside, h, lists = rows_of_parts(rows, U, H, ROWS)
    sink = tl.full([ROWS], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h, mask=inside, other=float("-inf")) * LOG2_E_IN_KERNELS
    most = sink
    for w in range(width):
        most = tl.maximum(most, load_part_lse(part_lse_ptr, there_ptr, row, lists, inside, w, width))
    pivot = tl.where(most == float("-inf"), 0.0, most)
    total = tl.exp2(sink - pivot)
    o = tl.zeros([ROWS, V0], tl.float32)
    for w in range(width):
        p = tl.exp2(load_part_lse(part_lse_ptr, there_ptr, row, lists, inside, w, width) - pivot)
        part = load_gathered(part_ptr, (row * width + w) * V, p > 0, V, V0)
        o += p[:, None] * part.to(tl.float32)
        total += p
    some = total > 0
    to = tl.cast(start, tl.int64) * H + row
    store_gathered(o_ptr, to * V, inside, o / tl.where(some, total, 1.0)[:, None], V, V0)
    tl.store(lse_ptr + to, tl.where(some, pivot + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=inside)


def row_sizes(dim: int) -> dict[str, int]:
    """Sizes of the kernels that go over queries and heads: programs of 2048 numbers of `dim` columns."""
    padded = max(16, triton.next_power_of_2(dim))
    return {"V": dim, "V0": padded, "ROWS": 2048 // padded}


class TileSizes(NamedTuple):
    """Compile-time sizes of head dims and tiles; `forward`, `dq` and `dk` are rows and keys of a tile."""

    K0: int
    V0: int
    heads: int
    forward: tuple[int, int]
    dq: tuple[int, int]
    dk: tuple[int, int]

    @classmethod
    def of(cls, dtype: torch.dtype, key_dim: int, value_dim: int, heads: int) -> TileSizes:
        """Sizes for a dtype, head dims and the number of query heads of a pair."""
        K0, V0 = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
        wide = max(K0, V0) > 128
        if dtype == torch.float32:
            keys = 16 if wide else 32
            return cls(K0, V0, heads, (32, keys), (32, keys), (keys, keys))
        if wide:
            return cls(K0, V0, heads, (64, 32), (64, 32), (32, 32))
        return cls(K0, V0, heads, (64, 64), (64, 64), (32, 64))

    def sizes(self, tile: tuple[int, int]) -> dict[str, int]:
        """The sizes by the names of kernel arguments."""
        return {"K0": self.K0, "V0": self.V0, "HEADS": self.heads, "ROW_HEADS": min(self.heads, tile[0]),
                "BLOCK_M": tile[0], "BLOCK_C": tile[1]}

    def pairs(self, tile: tuple[int, int]) -> int:
        """Pairs of a tile."""
        return tile[0] // min(self.heads, tile[0])

    def head_tiles(self, tile: tuple[int, int]) -> int:
        """Tiles that hold the query heads of a pair."""
        return triton.cdiv(self.heads, tile[0])


class Options(NamedTuple):
    """Options of a call, beside its tensors."""

    scale: float
    block: int | None
    window: int | None
    borders: CuSeqlens | None


class Sets:
    """The sets of keys of a call, listed ones and those of the window, with their places in work buffers."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, window_k: Tensor | None, window_v: Tensor | None,
                 sinks: Tensor | None, bias: Tensor | None, indices: Tensor, options: Options):
        (batch, queries, self.heads, _), device = q.shape, q.device
        self.q, self.batch, self.queries, self.options = q, batch, queries, options
        self.sinks, self.bias, self.value_dim = sinks, bias, v.shape[3]
        self.keys = [k] if window_k is None else [k, window_k]  # those of the window last
        own = window_k is not None and window_v is not None
        keys = (window_k if window_k is not None else k).shape[1]
        self.offset = keys - queries
        position_M = torch.arange(self.offset, keys, device=device).repeat(batch)
        self.lists = indices.shape[2]
        self.sets: list[KeySet] = []
        if indices.shape[3] and options.block is not None:
            documents = Documents.of(batch, queries, k.shape[1], options.block, options.borders, device)
            hidden = options.window if options.window is not None and not own else 0
            self.sets.append(KeySet(k, v, indices.flatten(0, 1), documents, position_M, options.block, hidden,
                                    bias_MUN=None if bias is None else bias.flatten(0, 1)))
        if options.window is not None:
            self.sets.append(KeySet.of_window(
                k if window_k is None else window_k, v if window_v is None else window_v, options.window, position_M,
                batch, options.borders))
        self.width = max(1, sum(keys.units_MUN.shape[2] for keys in self.sets))

    def sizes(self, keys: KeySet) -> tuple[TileSizes, int]:
        """Tile sizes of a set, and the key heads that programs of one list tell apart."""
        groups = keys.k_BSGK.shape[2]
        lists = keys.units_MUN.shape[1]
        heads = self.heads // max(lists, groups)
        return (TileSizes.of(dtype_of_tiles(self.q.dtype), self.q.shape[3], keys.v_BSGV.shape[3], heads),
                groups if lists == 1 else 1)

    def numbers(self, keys: KeySet, start: int, place: int) -> dict[str, Any]:
        """Arguments of the kernels that say where a piece and a set lie."""
        groups, key_dim, value_dim = keys.k_BSGK.shape[2], keys.k_BSGK.shape[3], keys.v_BSGV.shape[3]
        return {"start": start, "T": self.queries, "S": keys.k_BSGK.shape[1], "offset": self.offset,
                "hidden": keys.hidden, "window": keys.window, "N": keys.units_MUN.shape[2],
                "U": keys.units_MUN.shape[1], "place": place, "width": self.width, "H": self.heads, "G": groups,
                "K": key_dim, "V": value_dim}

    def pieces(self, dim: int) -> Iterator[slice]:
        """Pieces of the queries of all rows whose parts of `dim` columns fit into the work buffer."""
        total = self.batch * self.queries
        most = WORK_BUFFER_BYTES // (self.heads * self.width * (dim * part_dtype(self.q).itemsize + 16))
        size = max(MIN_BLOCK_QUERIES, most // MIN_BLOCK_QUERIES * MIN_BLOCK_QUERIES)
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))

    def cut(self, piece: slice) -> list[tuple[KeySet, Pairs, int]]:
        """The pairs of each set, and its first place in work buffers."""
        found, place = [], 0
        for keys in self.sets:
            found.append((keys, keys.pairs(piece), place))
            place += keys.units_MUN.shape[2]
        return found

    def there(self, cut: list[tuple[KeySet, Pairs, int]], piece: slice) -> Tensor:
        """Flags of the parts that exist, uint8 [M, U, W]."""
        size = (piece.stop - piece.start, self.lists)
        if not cut:
            return torch.zeros(*size, self.width, dtype=torch.uint8, device=self.q.device)
        return torch.cat([pairs.there_MUN.expand(*size, -1) for _, pairs, _ in cut], 2).to(torch.uint8)


def part_dtype(q: Tensor) -> torch.dtype:
    """The dtype of parts in work buffers."""
    return q.dtype if q.dtype == torch.bfloat16 else torch.float32


def attend(sets: Sets) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V], and the log2 of the sums of exp2 [B, T, H]."""
    q, heads, device = sets.q, sets.heads, sets.q.device
    o = torch.empty(*q.shape[:3], sets.value_dim, dtype=q.dtype, device=device)
    lse = torch.empty(*q.shape[:3], dtype=torch.float32, device=device)
    sizes_of_rows = row_sizes(sets.value_dim)
    for piece in sets.pieces(sets.value_dim):
        size, cut = piece.stop - piece.start, sets.cut(piece)
        part = torch.empty(size, heads, sets.width, sets.value_dim, dtype=part_dtype(q), device=device)
        part_lse = torch.empty(size, heads, sets.width, dtype=torch.float32, device=device)
        for keys, pairs, place in cut:
            sizes, key_heads = sets.sizes(keys)
            tiles = pairs.tiles(sizes.pairs(sizes.forward), keys.num_blocks)
            forward_kernel[len(tiles.table), key_heads * sizes.head_tiles(sizes.forward)](
                q_ptr=q, k_ptr=keys.k_BSGK, v_ptr=keys.v_BSGV, tiles_ptr=tiles.table, order_ptr=pairs.order,
                blocks_ptr=keys.documents.blocks_P2, bias_ptr=keys.bias_MUN, part_ptr=part, part_lse_ptr=part_lse,
                scale=sets.options.scale * LOG2_E, **sets.numbers(keys, piece.start, place),
                **sizes.sizes(sizes.forward))
        join_kernel[(triton.cdiv(size * heads, sizes_of_rows["ROWS"]),)](
            part_ptr=part, part_lse_ptr=part_lse, there_ptr=sets.there(cut, piece), sinks_ptr=sets.sinks, o_ptr=o,
            lse_ptr=lse, start=piece.start, rows=size * heads, width=sets.width, U=sets.lists, H=heads, **sizes_of_rows)
    return o, lse


def compile_types() -> dict[str, str]:
    """Types of the kernels' arguments in bf16."""
    types = dict.fromkeys((*OF_THE_BATCH, "H", "G", "rows", "block", "num_blocks", "axes", "W"), "i32")
    types |= {"scale": "fp32", "scale2": "fp32", "blocks_ptr": "*i64", "there_ptr": "*u8"}
    types |= dict.fromkeys(("tiles_ptr", "order_ptr", "first_ptr"), "*i32")
    types |= {f"{x}_ptr": "*bf16" for x in ("q", "k", "v", "o", "do", "part", "sum")}
    single = ("bias", "part_lse", "sinks", "lse", "dlse", "delta", "d_bias", "total")
    return types | {f"{x}_ptr": "*fp32" for x in single}


def _compile_cases() -> list[CompileCase]:
    found = []
    for dim in (64, 128):
        sizes = TileSizes.of(torch.bfloat16, dim, dim, 16)
        found.append(CompileCase(f"listed forward, 16 heads of {dim}", forward_kernel, compile_types(),
                                 {"K": dim, "V": dim} | sizes.sizes(sizes.forward), head_dim=dim))
    found.append(CompileCase("listed: join", join_kernel, compile_types(), row_sizes(128)))
    return found


COMPILE_CASES = _compile_cases()
