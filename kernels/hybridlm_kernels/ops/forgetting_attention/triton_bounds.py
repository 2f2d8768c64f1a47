"""The tiles of scores that forgetting attention leaves out, because nothing of them is left in fp32: their bounds.

A query t forgets a key s where even the largest score that norms allow is so far below that of the query with itself
that exp of the difference is 0 in fp32:

    |scale| |q_t| max_s |k_s| + F_t - F_s <= scale q_t . k_t - 105

The largest score of a query is at least that with itself, so such a key has the probability 0. F falls, so all keys
before a forgotten one are forgotten too: a tile of queries starts at the first tile of keys that one of its queries has
not forgotten, and a tile of keys ends at the last tile of queries that reads it. Nothing waits for the device.

Source: Lin et al. 2025, Adaptive Computation Pruning for the Forgetting Transformer, section 3. Their bound is one
number for all queries, from norms alone; they prune what adds up to e^-10, here what is 0.

B rows, T queries and S keys per row (the queries are the last T positions), M queries and L keys of all rows, H query
heads, G key/value heads, K key dim, P tiles of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.forgetting_attention.triton_tiles import (
    TileSizes,
    difference,
    find_tile,
    first_query_tile,
    tiles_of,
)
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.triton_tiles import LOG2_E
from hybridlm_kernels.triton_support import CompileCase

# exp of -104 is less than half of the smallest number of fp32. One more is for the rounding of scores, beside what
# NORM_SLACK is for: products of long vectors, and their norms.
FORGOTTEN_NATS = 105.0
NORM_SLACK = 1e-4
MIN_QUERIES = 16  # of a row; in decoding the norms of all keys would cost as much as the keys that are left out
TILES_PER_STEP = 128  # whose bounds a program compares at once
_FORGOTTEN, _LARGEST = tl.constexpr(FORGOTTEN_NATS), tl.constexpr(1.0 + NORM_SLACK)


@triton.jit(do_not_specialize=["B", "T", "S", "num_keys", "num_tiles"])
def first_keys_kernel(q_ptr, k_ptr, norm_ptr, high_ptr, low_ptr, tiles_ptr, first_ptr, scale, B, T, S, num_keys,
                      num_tiles, H, G, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
                      COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """Write the first key that a tile of queries reads [H, P], the first one of a tile of keys."""
    first_query, first_key, past, queries, start = find_tile(tiles_ptr, T, S, B, False, BLOCK_T)
    h = tl.program_id(1).to(tl.int64)
    place = tl.minimum(start + tl.arange(0, BLOCK_T), queries - 1)
    t, b = past + place, past + start
    query = q_ptr + ((first_query + place) * H + h) * K
    key = k_ptr + ((first_key + t) * G + h // (H // G)) * K
    own = tl.zeros([BLOCK_T], tl.float32)
    square = tl.zeros([BLOCK_T], tl.float32)
    for column in tl.static_range(0, K, COLUMNS):
        c = column + tl.arange(0, COLUMNS)
        q = tl.load(query[:, None] + c[None, :], mask=(c < K)[None, :], other=0.0).to(tl.float32)
        k = tl.load(key[:, None] + c[None, :], mask=(c < K)[None, :], other=0.0).to(tl.float32)
        own += tl.sum(q * k, 1)
        square += tl.sum(q * q, 1)
    largest = tl.abs(scale) * _LARGEST * tl.sqrt(square) * tl.load(norm_ptr + h // (H // G))
    high_ptr += h * num_keys + first_key
    low_ptr += h * num_keys + first_key
    high_b, low_b = tl.load(high_ptr + b), tl.load(low_ptr + b)
    # Key s is forgotten by the query where F_b - F_s + reach <= 0.
    reach = difference(tl.load(high_ptr + t), tl.load(low_ptr + t), high_b, low_b)
    reach += (largest - scale * own + _FORGOTTEN) * LOG2_E
    reach = tl.max(tl.where(reach == reach, reach, float("inf")), 0)  # NaN forgets nothing
    count = tl.zeros([TILES], tl.int32)
    tiles = (b + 1) // BLOCK_S  # all of whose keys come before b or are b
    for at in range(0, tiles, TILES):
        tile = at + tl.arange(0, TILES)
        s = tile * BLOCK_S + (BLOCK_S - 1)
        high_s = tl.load(high_ptr + s, mask=tile < tiles, other=float("-inf"))
        low_s = tl.load(low_ptr + s, mask=tile < tiles, other=0.0)
        count += (difference(high_b, low_b, high_s, low_s) + reach <= 0).to(tl.int32)
    number = first_query_tile(tiles_ptr, T, B, BLOCK_T) + start // BLOCK_T
    tl.store(first_ptr + h * num_tiles + number, tl.sum(count, 0) * BLOCK_S)


@triton.jit(do_not_specialize=["B", "T", "S", "num_tiles"])
def last_queries_kernel(first_ptr, tiles_ptr, last_ptr, B, T, S, num_tiles, QUERIES: tl.constexpr,
                        BLOCK_S: tl.constexpr, TILES: tl.constexpr):
    """Write the end of the queries that read a tile of keys, [H, programs], from the first keys of tiles of queries."""
    _, _, _past, queries, start = find_tile(tiles_ptr, T, S, B, True, BLOCK_S)
    h = tl.program_id(1).to(tl.int64)
    first_ptr += h * num_tiles + first_query_tile(tiles_ptr, T, B, QUERIES)
    end = tl.zeros([TILES], tl.int32)
    tiles = tl.cdiv(queries, QUERIES)
    for at in range(0, tiles, TILES):
        tile = at + tl.arange(0, TILES)
        first = tl.load(first_ptr + tile, mask=tile < tiles, other=0)
        reads = (tile < tiles) & (first < start + BLOCK_S)
        end = tl.maximum(end, tl.where(reads, (tile + 1) * QUERIES, 0))
    tl.store(last_ptr + h * tl.num_programs(0) + tl.program_id(0), tl.minimum(tl.max(end, 0), queries))


def find_first_keys(q_BTHK: Tensor, k_BSGK: Tensor, high_HL: Tensor, low_HL: Tensor, scale: float, sizes: TileSizes,
                    borders: CuSeqlens | None) -> Tensor | None:
    """Find where the keys begin that a tile of queries has not forgotten.

    Args:
        q_BTHK: queries, contiguous.
        k_BSGK: keys, contiguous.
        high_HL: high part of the sums of gates, in units of log2.
        low_HL: low part.
        scale: factor on the products of queries and keys.
        sizes: tiles are those of `sizes.forward`.
        borders: of packed documents; None where each row is one.

    Returns:
        Places of keys in the document, int32 [H, P], by tiles of queries in the order of documents. None where all keys
        are to be read.
    """
    (batch, queries, heads, key_dim), (keys, groups) = q_BTHK.shape, k_BSGK.shape[1:3]
    if queries < MIN_QUERIES:
        return None
    tiles, number = tiles_of(batch, queries, borders, q_BTHK.device, sizes.forward[0], False, sizes.forward[0])
    norm_G = torch.linalg.vector_norm(k_BSGK, dim=-1, dtype=torch.float32).amax((0, 1))
    first_HP = torch.empty(heads, number, dtype=torch.int32, device=q_BTHK.device)
    first_keys_kernel[number, heads](
        q_ptr=q_BTHK, k_ptr=k_BSGK, norm_ptr=norm_G, high_ptr=high_HL, low_ptr=low_HL, tiles_ptr=tiles,
        first_ptr=first_HP, scale=float(scale), B=batch, T=queries, S=keys, num_keys=batch * keys, num_tiles=number,
        H=heads, G=groups, K=key_dim, BLOCK_T=sizes.forward[0], BLOCK_S=sizes.forward[1], COLUMNS=min(64, sizes.K0),
        TILES=TILES_PER_STEP, num_warps=4)
    return first_HP


def find_last_queries(first_HP: Tensor | None, batch: int, queries: int, keys: int, sizes: TileSizes,
                      borders: CuSeqlens | None) -> Tensor | None:
    """Find where the queries end that read a tile of keys.

    Args:
        first_HP: from `find_first_keys`.
        batch: B.
        queries: T.
        keys: S.
        sizes: tiles of keys are those of `sizes.dk`.
        borders: as for `find_first_keys`.

    Returns:
        Places of queries in the document, int32 [H, programs], in the order of the programs of a grid over tiles of
        keys; None where `first_HP` is.
    """
    if first_HP is None:
        return None
    tiles, number = tiles_of(batch, keys, borders, first_HP.device, sizes.dk[1], True, sizes.forward[0])
    heads, num_tiles = first_HP.shape
    last_HP = torch.empty(heads, number, dtype=torch.int32, device=first_HP.device)
    last_queries_kernel[number, heads](
        first_ptr=first_HP, tiles_ptr=tiles, last_ptr=last_HP, B=batch, T=queries, S=keys, num_tiles=num_tiles,
        QUERIES=sizes.forward[0], BLOCK_S=sizes.dk[1], TILES=TILES_PER_STEP, num_warps=4)
    return last_HP


def _compile_cases() -> list[CompileCase]:
    types = dict.fromkeys(("B", "T", "S", "num_keys", "num_tiles", "H", "G"), "i32") | {"scale": "fp32"}
    types |= {"tiles_ptr": "*i64", "first_ptr": "*i32", "last_ptr": "*i32", "q_ptr": "*bf16", "k_ptr": "*bf16"}
    types |= {f"{name}_ptr": "*fp32" for name in ("norm", "high", "low")}
    found = []
    for label, rows in (("packed", {}), ("rows", {"tiles_ptr": None})):
        given = {name: kind for name, kind in types.items() if name not in rows}
        sizes = TileSizes.of(torch.bfloat16, 128, 128, 128)
        found += [CompileCase(f"first keys, {label}, D=128", first_keys_kernel, given,
                              {"K": 128, "BLOCK_T": sizes.forward[0], "BLOCK_S": sizes.forward[1], "COLUMNS": 64,
                               "TILES": TILES_PER_STEP} | rows, head_dim=128),
                  CompileCase(f"last queries, {label}", last_queries_kernel, given,
                              {"QUERIES": sizes.forward[0], "BLOCK_S": sizes.dk[1], "TILES": TILES_PER_STEP} | rows)]
    return found


COMPILE_CASES = _compile_cases()
