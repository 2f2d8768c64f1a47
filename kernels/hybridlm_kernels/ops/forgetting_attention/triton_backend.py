"""Forgetting attention as Triton kernels, forward and backward, with tiles of scores that are never written.

The forward has a program per query head and tile of queries, which keeps the logarithm of the sum. The backward has the
same for dq, then one per key head and tile of keys for dk, dv and what each key takes from the sums of gates. Every sum
has a fixed order and there are no atomics. Tiles are counted from the first token of a document, so that a packed
document gets the bits that it gets alone.

The bias F_t - F_s of a pair is the difference of two sums of gates (`triton_gates`). Where all keys of a tile come
before all its queries, it is split at a token b between them, (F_t - F_b) + (F_b - F_s): one vector each, both of one
sign, so that no bit cancels.

Tiles in which every key is forgotten are left out (`triton_bounds`): their probabilities are 0, so no bit changes.

B rows, T queries and S keys per row (the queries are the last T positions), M queries and L keys of all rows, H query
heads, G key/value heads, K key dim, V value dim, P tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.forgetting_attention.triton_bounds import find_first_keys, find_last_queries
from hybridlm_kernels.ops.forgetting_attention.triton_gates import gate_gradients, sum_gates
from hybridlm_kernels.ops.forgetting_attention.triton_tiles import (
    TileSizes,
    difference,
    find_tile,
    first_key_to_read,
    load_rows,
    store_rows,
    tiles_of,
)
from hybridlm_kernels.ops.sparse_attention.triton_backend import LOG2_E
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, dtype_of_tiles, tuned

_OF_THE_BATCH = ["B", "T", "S", "num_queries", "num_keys", "num_tiles"]
_KEY = ["H", "G", "K", "V", "BLOCK_T"]
_TWO_OR_THREE_STAGES = [triton.Config({}, num_warps=8, num_stages=2), triton.Config({}, num_warps=8, num_stages=3)]
_ONE_OR_TWO_STAGES = [triton.Config({}, num_warps=8, num_stages=1),  # with two it spills on Blackwell
                      triton.Config({}, num_warps=8, num_stages=2)]


@triton.jit
def _hide(score, t, s, window, CUT: tl.constexpr):
    """Scores, -inf where a key is not seen; with CUT keys may lie behind queries. t and s broadcast."""
    if window is not None:
        score = tl.where(s > t - window, score, float("-inf"))
    if CUT:
        score = tl.where(s <= t, score, float("-inf"))
    return score


@triton.jit
def _scores_of_queries(q, k, high_ptr, low_ptr, t, s, last, high_t, low_t, high_b, low_b, scale, window,
                       CUT: tl.constexpr):
    """Scores [queries, keys] of a tile in units of log2; without CUT keys lie before b and b before queries."""
    at = tl.minimum(s, last)
    high_s, low_s = tl.load(high_ptr + at), tl.load(low_ptr + at)
    if CUT:
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = product * scale + difference(high_t[:, None], low_t[:, None], high_s[None, :], low_s[None, :])
    else:
        near, far = difference(high_t, low_t, high_b, low_b), difference(high_b, low_b, high_s, low_s)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = product * scale + (near[:, None] + far[None, :])
    return _hide(score, t[:, None], s[None, :], window, CUT)


@triton.jit
def _attend(q, k_ptr, v_ptr, high_ptr, low_ptr, begin, last, t, high_t, low_t, high_b, low_b, scale, window, G, most,
            total, o, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr, BLOCK_S: tl.constexpr,
            CUT: tl.constexpr):
    """Takes a tile of keys, the last of all being `last`, into the maximum, the sum and the output of the queries."""
    k = load_rows(k_ptr, begin, last, G * K, BLOCK_S, K, K0)
    score = _scores_of_queries(q, k, high_ptr, low_ptr, t, begin + tl.arange(0, BLOCK_S), last, high_t, low_t, high_b,
                               low_b, scale, window, CUT)
    above = tl.maximum(most, tl.max(score, 1))
    pivot = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(score - pivot[:, None])
    shrink = tl.exp2(most - pivot)
    v = load_rows(v_ptr, begin, last, G * V, BLOCK_S, V, V0)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    return above, total * shrink + tl.sum(p, 1), o


@tuned(_TWO_OR_THREE_STAGES, key=_KEY)
@triton.jit(do_not_specialize=_OF_THE_BATCH)
def forward_kernel(q_ptr, k_ptr, v_ptr, high_ptr, low_ptr, tiles_ptr, first_ptr, o_ptr, lse_ptr, scale, window, B, T,
                   S, num_queries, num_keys, num_tiles, H, G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr,
                   V0: tl.constexpr, QUERIES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Write o [M, H, V] and the log2 of the sums of exp2 [H, M]. `scale` includes log2 e."""
    first_query, first_key, past, queries, start = find_tile(tiles_ptr, T, S, B, False, BLOCK_T)
    h = tl.program_id(1).to(tl.int64)
    head = first_query * H + h
    place = tl.minimum(start + tl.arange(0, BLOCK_T), queries - 1)  # beyond the last query it is computed again
    t, b, last = past + place, past + start, past + queries - 1
    q = load_rows(q_ptr + head * K, start, queries - 1, H * K, BLOCK_T, K, K0)
    high_ptr += h * num_keys + first_key
    low_ptr += h * num_keys + first_key
    high_t, low_t = tl.load(high_ptr + t), tl.load(low_ptr + t)
    high_b, low_b = tl.load(high_ptr + b), tl.load(low_ptr + b)
    k_ptr += (first_key * G + h // (H // G)) * K
    v_ptr += (first_key * G + h // (H // G)) * V
    most = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    o = tl.zeros([BLOCK_T, V0], tl.float32)
    begin = first_key_to_read(first_ptr, tiles_ptr, start, b, h, window, T, B, num_tiles, QUERIES, BLOCK_S)
    cut = (b + 1) // BLOCK_S * BLOCK_S  # from here on keys may lie behind b
    for at in tl.range(begin, cut, BLOCK_S, disable_licm=True):
        most, total, o = _attend(q, k_ptr, v_ptr, high_ptr, low_ptr, at, last, t, high_t, low_t, high_b, low_b, scale,
                                 window, G, most, total, o, K, V, K0, V0, BLOCK_S, False)
    for at in tl.range(cut, tl.minimum(b + BLOCK_T, past + queries), BLOCK_S, disable_licm=True):
        most, total, o = _attend(q, k_ptr, v_ptr, high_ptr, low_ptr, at, last, t, high_t, low_t, high_b, low_b, scale,
                                 window, G, most, total, o, K, V, K0, V0, BLOCK_S, True)
    store_rows(o_ptr + head * V, start, queries - 1, H * V, o / total[:, None], BLOCK_T, V, V0)
    tl.store(lse_ptr + h * num_queries + first_query + place, most + tl.log2(total))


@triton.jit
def _query_gradients(q, do, k_ptr, v_ptr, high_ptr, low_ptr, begin, last, t, high_t, low_t, high_b, low_b, scale,
                     window, G, lse, delta, dq, gained, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr,
                     V0: tl.constexpr, BLOCK_S: tl.constexpr, CUT: tl.constexpr):
    """Adds what a tile of keys gives to dq and to the sums of the scores' gradients."""
    k = load_rows(k_ptr, begin, last, G * K, BLOCK_S, K, K0)
    score = _scores_of_queries(q, k, high_ptr, low_ptr, t, begin + tl.arange(0, BLOCK_S), last, high_t, low_t, high_b,
                               low_b, scale, window, CUT)
    p = tl.exp2(score - lse[:, None])
    v = load_rows(v_ptr, begin, last, G * V, BLOCK_S, V, V0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee"), gained + tl.sum(ds, 1)


@tuned(_TWO_OR_THREE_STAGES, key=_KEY)
@triton.jit(do_not_specialize=_OF_THE_BATCH)
def query_gradients_kernel(q_ptr, k_ptr, v_ptr, high_ptr, low_ptr, tiles_ptr, first_ptr, o_ptr, do_ptr, lse_ptr,
                           dq_ptr, delta_ptr, shifted_ptr, rest_ptr, gained_ptr, scale, scale2, window, B, T, S,
                           num_queries, num_keys, num_tiles, H, G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr,
                           V0: tl.constexpr, QUERIES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Write dq [M, H, K]; [H, M]: do . o, the two parts of F - lse, and the sums of the scores' gradients.

    `scale2` = scale log2 e.
    """
    first_query, first_key, past, queries, start = find_tile(tiles_ptr, T, S, B, False, BLOCK_T)
    h = tl.program_id(1).to(tl.int64)
    head = first_query * H + h
    place = tl.minimum(start + tl.arange(0, BLOCK_T), queries - 1)
    t, b, last = past + place, past + start, past + queries - 1
    of_query = h * num_queries + first_query + place
    o = load_rows(o_ptr + head * V, start, queries - 1, H * V, BLOCK_T, V, V0)
    do = load_rows(do_ptr + head * V, start, queries - 1, H * V, BLOCK_T, V, V0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + of_query, delta)
    lse = tl.load(lse_ptr + of_query)
    high_ptr += h * num_keys + first_key
    low_ptr += h * num_keys + first_key
    high_t, low_t = tl.load(high_ptr + t), tl.load(low_ptr + t)
    high_b, low_b = tl.load(high_ptr + b), tl.load(low_ptr + b)
    shifted = high_t - lse
    undone = shifted - high_t
    tl.store(shifted_ptr + of_query, shifted)
    tl.store(rest_ptr + of_query, low_t + ((high_t - (shifted - undone)) - (lse + undone)))  # what rounding lost
    q = load_rows(q_ptr + head * K, start, queries - 1, H * K, BLOCK_T, K, K0)
    k_ptr += (first_key * G + h // (H // G)) * K
    v_ptr += (first_key * G + h // (H // G)) * V
    dq = tl.zeros([BLOCK_T, K0], tl.float32)
    gained = tl.zeros([BLOCK_T], tl.float32)
    begin = first_key_to_read(first_ptr, tiles_ptr, start, b, h, window, T, B, num_tiles, QUERIES, BLOCK_S)
    cut = (b + 1) // BLOCK_S * BLOCK_S
    for at in tl.range(begin, cut, BLOCK_S, disable_licm=True):
        dq, gained = _query_gradients(q, do, k_ptr, v_ptr, high_ptr, low_ptr, at, last, t, high_t, low_t, high_b, low_b,
                                      scale2, window, G, lse, delta, dq, gained, K, V, K0, V0, BLOCK_S, False)
    for at in tl.range(cut, tl.minimum(b + BLOCK_T, past + queries), BLOCK_S, disable_licm=True):
        dq, gained = _query_gradients(q, do, k_ptr, v_ptr, high_ptr, low_ptr, at, last, t, high_t, low_t, high_b, low_b,
                                      scale2, window, G, lse, delta, dq, gained, K, V, K0, V0, BLOCK_S, True)
    store_rows(dq_ptr + head * K, start, queries - 1, H * K, dq * scale, BLOCK_T, K, K0)
    if gained_ptr is not None:
        tl.store(gained_ptr + of_query, gained)


@triton.jit
def _key_gradients(k, v, q_ptr, do_ptr, shifted_ptr, rest_ptr, delta_ptr, begin, last, past, s, high_s, low_s, high_b,
                   low_b, scale, window, H, dk, dv, lost, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr,
                   V0: tl.constexpr, BLOCK_T: tl.constexpr, CUT: tl.constexpr):
    """Adds what a tile of queries of a head gives to dk, dv and the sums of the scores' gradients."""
    place = begin + tl.arange(0, BLOCK_T)
    at = tl.minimum(place, last)
    shifted, rest = tl.load(shifted_ptr + at), tl.load(rest_ptr + at)
    shifted = tl.where(place > last, float("-inf"), shifted)  # queries that do not exist have p = 0
    q = load_rows(q_ptr, begin, last, H * K, BLOCK_T, K, K0)
    if CUT:
        product = tl.dot(k, tl.trans(q), input_precision="ieee")
        score = product * scale + difference(shifted[None, :], rest[None, :], high_s[:, None], low_s[:, None])
    else:
        near, far = difference(shifted, rest, high_b, low_b), difference(high_b, low_b, high_s, low_s)
        product = tl.dot(k, tl.trans(q), input_precision="ieee")
        score = product * scale + (near[None, :] + far[:, None])
    p = tl.exp2(_hide(score, past + place[None, :], s[:, None], window, CUT))
    do = load_rows(do_ptr, begin, last, H * V, BLOCK_T, V, V0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - tl.load(delta_ptr + at)[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv, lost + tl.sum(ds, 1)


@tuned(_ONE_OR_TWO_STAGES, key=_KEY)
@triton.jit(do_not_specialize=_OF_THE_BATCH)
def key_gradients_kernel(q_ptr, k_ptr, v_ptr, high_ptr, low_ptr, tiles_ptr, last_ptr, do_ptr, delta_ptr, shifted_ptr,
                         rest_ptr, dk_ptr, dv_ptr, lost_ptr, scale, scale2, window, B, T, S, num_queries, num_keys, H,
                         G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr,
                         BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Write dk [L, G, K] and dv [L, G, V], over the query heads of a key head, and for each query head the sums of the
    scores' gradients [H, L]. `scale2` = scale log2 e."""
    first_query, first_key, past, queries, start = find_tile(tiles_ptr, T, S, B, True, BLOCK_S)
    g, last = tl.program_id(1).to(tl.int64), past + queries - 1
    row = first_key * G + g
    s = tl.minimum(start + tl.arange(0, BLOCK_S), last)
    k = load_rows(k_ptr + row * K, start, last, G * K, BLOCK_S, K, K0)
    v = load_rows(v_ptr + row * V, start, last, G * V, BLOCK_S, V, V0)
    dk = tl.zeros([BLOCK_S, K0], tl.float32)
    dv = tl.zeros([BLOCK_S, V0], tl.float32)
    b = tl.minimum(start + BLOCK_S - 1, last)
    begin = tl.maximum(start - past, 0)
    # From the tile on whose first query is b or later, all keys of this tile come before all queries.
    uncut = begin + tl.cdiv(tl.maximum(b - past - begin, 0), BLOCK_T) * BLOCK_T
    most = queries
    if window is not None:
        most = tl.minimum(queries, b + window - past)
    for member in range(H // G):
        h = g * (H // G) + member
        end = most
        if last_ptr is not None:
            end = tl.minimum(most, tl.load(last_ptr + h * tl.num_programs(0) + tl.program_id(0)))
        head, of_query, of_key = first_query * H + h, h * num_queries + first_query, h * num_keys + first_key
        high_s, low_s = tl.load(high_ptr + of_key + s), tl.load(low_ptr + of_key + s)
        high_b, low_b = tl.load(high_ptr + of_key + b), tl.load(low_ptr + of_key + b)
        lost = tl.zeros([BLOCK_S], tl.float32)
        for at in tl.range(begin, tl.minimum(uncut, end), BLOCK_T, disable_licm=True):
            dk, dv, lost = _key_gradients(
                k, v, q_ptr + head * K, do_ptr + head * V, shifted_ptr + of_query, rest_ptr + of_query,
                delta_ptr + of_query, at, queries - 1, past, s, high_s, low_s, high_b, low_b, scale2, window, H, dk, dv,
                lost, K, V, K0, V0, BLOCK_T, True)
        for at in tl.range(uncut, end, BLOCK_T, disable_licm=True):
            dk, dv, lost = _key_gradients(
                k, v, q_ptr + head * K, do_ptr + head * V, shifted_ptr + of_query, rest_ptr + of_query,
                delta_ptr + of_query, at, queries - 1, past, s, high_s, low_s, high_b, low_b, scale2, window, H, dk, dv,
                lost, K, V, K0, V0, BLOCK_T, False)
        if lost_ptr is not None:
            tl.store(lost_ptr + of_key + s, lost)
    store_rows(dk_ptr + row * K, start, last, G * K, dk * scale, BLOCK_S, K, K0)
    store_rows(dv_ptr + row * V, start, last, G * V, dv, BLOCK_S, V, V0)


def forgetting_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, g_BSH: Tensor, scale: float,
                         window: int | None, cu_seqlens: CuSeqlens | None) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    dtype = torch.promote_types(torch.promote_types(q_BTHK.dtype, k_BSGK.dtype), v_BSGV.dtype)
    q, k, v = (x.to(dtype).contiguous() for x in (q_BTHK, k_BSGK, v_BSGV))
    return _TritonForgettingAttention.apply(q, k, v, g_BSH.contiguous(), scale, window, cu_seqlens).to(v_BSGV.dtype)


class _TritonForgettingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, window: int | None,
                borders: CuSeqlens | None) -> Tensor:
        (batch, queries, heads, key_dim), value_dim = q.shape, v.shape[3]
        sizes = TileSizes.of(dtype_of_tiles(q.dtype), key_dim, value_dim, queries)
        high_HL, low_HL = sum_gates(g, queries, borders)
        o = torch.empty(batch, queries, heads, value_dim, dtype=q.dtype, device=q.device)
        lse_HM = torch.empty(heads, batch * queries, dtype=torch.float32, device=q.device)
        first_HP = find_first_keys(q, k, high_HL, low_HL, scale, sizes, borders)
        tiles, number = tiles_of(batch, queries, borders, q.device, sizes.forward[0], False, sizes.forward[0])
        forward_kernel[number, heads](
            q_ptr=q, k_ptr=k, v_ptr=v, high_ptr=high_HL, low_ptr=low_HL, tiles_ptr=tiles, first_ptr=first_HP, o_ptr=o,
            lse_ptr=lse_HM, scale=scale * LOG2_E, num_tiles=number, QUERIES=sizes.forward[0],
            **_numbers(q, k, v, window), **sizes.sizes(sizes.forward))
        ctx.save_for_backward(q, k, v, g, o, lse_HM, first_HP)
        ctx.options = scale, window, borders
        return o

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, o, lse_HM, first_HP = ctx.saved_tensors
        scale, window, borders = ctx.options
        (batch, queries, heads, key_dim), (keys, groups) = q.shape, k.shape[1:3]
        sizes = TileSizes.of(dtype_of_tiles(q.dtype), key_dim, v.shape[3], queries)
        do = do.contiguous()
        high_HL, low_HL = sum_gates(g, queries, borders)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        delta_HM, shifted_HM, rest_HM = (torch.empty_like(lse_HM) for _ in range(3))
        gained_HM = torch.empty_like(lse_HM) if ctx.needs_input_grad[3] else None
        lost_HL = torch.empty_like(high_HL) if ctx.needs_input_grad[3] else None
        common = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "high_ptr": high_HL, "low_ptr": low_HL, "do_ptr": do,
                  "delta_ptr": delta_HM, "shifted_ptr": shifted_HM, "rest_ptr": rest_HM, "scale": scale,
                  "scale2": scale * LOG2_E, **_numbers(q, k, v, window)}
        tiles, number = tiles_of(batch, queries, borders, q.device, sizes.dq[0], False, sizes.forward[0])
        query_gradients_kernel[number, heads](
            tiles_ptr=tiles, first_ptr=first_HP, o_ptr=o, lse_ptr=lse_HM, dq_ptr=dq, gained_ptr=gained_HM,
            num_tiles=0 if first_HP is None else first_HP.shape[1], QUERIES=sizes.forward[0], **common,
            **sizes.sizes(sizes.dq))
        last_HP = find_last_queries(first_HP, batch, queries, keys, sizes, borders)
        tiles, number = tiles_of(batch, keys, borders, q.device, sizes.dk[1], True, sizes.forward[0])
        key_gradients_kernel[number, groups](
            tiles_ptr=tiles, last_ptr=last_HP, dk_ptr=dk, dv_ptr=dv, lost_ptr=lost_HL, **common,
            **sizes.sizes(sizes.dk))
        dg = None
        if gained_HM is not None and lost_HL is not None:
            dg = gate_gradients(g, gained_HM, lost_HL, borders)
        return dq, dk, dv, dg, None, None, None


def _numbers(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> dict[str, int | None]:
    (batch, queries, heads, key_dim), (keys, groups) = q.shape, k.shape[1:3]
    return {"window": window, "B": batch, "T": queries, "S": keys, "num_queries": batch * queries,
            "num_keys": batch * keys, "H": heads, "G": groups, "K": key_dim, "V": v.shape[3]}


def _compile_cases() -> list[CompileCase]:
    types = dict.fromkeys((*_OF_THE_BATCH, "H", "G", "window"), "i32")
    types |= {"scale": "fp32", "scale2": "fp32", "tiles_ptr": "*i64", "first_ptr": "*i32", "last_ptr": "*i32"}
    types |= {f"{x}_ptr": "*bf16" for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv")}
    types |= {f"{x}_ptr": "*fp32" for x in ("high", "low", "lse", "delta", "shifted", "rest", "gained", "lost")}
    rows = {"window": None, "tiles_ptr": None}
    plain = {key: kind for key, kind in types.items() if key not in rows}
    found = []
    for dim in (64, 128, 256):
        dims, sizes = {"K": dim, "V": dim}, TileSizes.of(torch.bfloat16, dim, dim, 128)
        for name, kernel, tile in (("forward", forward_kernel, sizes.forward), ("dq", query_gradients_kernel, sizes.dq),
                                   ("dk, dv", key_gradients_kernel, sizes.dk)):
            constants = dims | sizes.sizes(tile)
            if kernel is not key_gradients_kernel:
                constants["QUERIES"] = sizes.forward[0]
            found += [CompileCase(f"{name}, packed, window, D={dim}", kernel, types, constants, head_dim=dim),
                      CompileCase(f"{name}, rows, D={dim}", kernel, plain, constants | rows, head_dim=dim)]
    sizes = TileSizes.of(torch.bfloat16, 128, 128, 1)
    found.append(CompileCase("forward, one query, D=128", forward_kernel, plain,
                             {"K": 128, "V": 128, "QUERIES": sizes.forward[0], "first_ptr": None} | rows
                             | sizes.sizes(sizes.forward), head_dim=128))
    return found


COMPILE_CASES = _compile_cases()
