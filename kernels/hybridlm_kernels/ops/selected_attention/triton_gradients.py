"""Gradients of attention over listed blocks and a window, by the tiles of its forward (`triton_forward`).

Three kernels per set of keys: dq of each row of a tile from its block, added up by query; dk and dv of a tile of keys
from a segment of the block's pairs; the sums over segments. Segments are short, so that a block that all queries list,
such as the first one, is the work of many programs. Letters as in `triton_backend`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.selected_attention.triton_forward import (
    CONFIGS,
    OF_THE_BATCH,
    TUNING_KEY,
    Sets,
    TileSizes,
    block_of_tile,
    compile_types,
    load_bias,
    load_gathered,
    part_dtype,
    row_sizes,
    rows_of_parts,
    rows_of_tile,
    seen_range,
    store_gathered,
)
from hybridlm_kernels.ops.selected_attention.triton_tiles import SEGMENT_ROWS, KeySet, Pairs
from hybridlm_kernels.ops.sparse_attention.triton_backend import LOG2_E
from hybridlm_kernels.triton_support import CompileCase, tuned


@triton.jit
def delta_kernel(o_ptr, do_ptr, dlse_ptr, delta_ptr, rows, V: tl.constexpr, V0: tl.constexpr, ROWS: tl.constexpr):
    """do . o - dlse of queries and heads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    o = load_gathered(o_ptr, row * V, inside, V, V0).to(tl.float32)
    do = load_gathered(do_ptr, row * V, inside, V, V0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(o * do, 1) - tl.load(dlse_ptr + row, mask=inside, other=0.0), mask=inside)


@tuned(CONFIGS, key=TUNING_KEY)
@triton.jit(do_not_specialize=OF_THE_BATCH)
def query_gradients_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, tiles_ptr, order_ptr, blocks_ptr, bias_ptr,
                           part_ptr, d_bias_ptr, scale, scale2, start, T, S, offset, hidden, window, N, U, place, width,
                           H, G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr,
                           HEADS: tl.constexpr, ROW_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dq of the rows of a tile from their block alone, and sums of the scores' gradients. `scale2` = scale log2 e."""
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
    do = load_gathered(do_ptr, (token * H + h) * V, inside, V, V0)
    shift = tl.load(lse_ptr + token * H + h, mask=inside, other=float("inf"))
    if bias_ptr is not None:
        shift -= load_bias(bias_ptr, pair, inside, start, U, N)
    delta = tl.load(delta_ptr + token * H + h, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, K0], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in tl.range(low - low % BLOCK_C, high + 1, BLOCK_C, disable_licm=True):
        c = at + tl.arange(0, BLOCK_C)
        row = (key + c) * G + g
        k = load_gathered(k_ptr, row * K, c < keys, K, K0)
        v = load_gathered(v_ptr, row * V, c < keys, V, V0)
        seen = c[None, :] <= last[:, None]
        if window is not None:
            seen = seen & (c[None, :] >= least[:, None])
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - shift[:, None]
        p = tl.exp2(tl.where(seen, score, float("-inf")))
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        total += tl.sum(ds, 1)
    to = local * H + h
    store_gathered(part_ptr, (to * width + place + pair % N) * K, inside, dq * scale, K, K0)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + (tl.cast(start, tl.int64) * H + to) * N + pair % N, total, mask=inside)


@triton.jit(do_not_specialize=["start", "rows", "width", "U"])
def add_parts_kernel(part_ptr, there_ptr, sum_ptr, start, rows, width, U, H, V: tl.constexpr, V0: tl.constexpr,
                     ROWS: tl.constexpr):
    """The sums of the parts of queries and heads."""
    row, inside, _h, lists = rows_of_parts(rows, U, H, ROWS)
    total = tl.zeros([ROWS, V0], tl.float32)
    for w in range(width):
        there = tl.load(there_ptr + lists * width + w, mask=inside, other=0) != 0
        total += load_gathered(part_ptr, (row * width + w) * V, there, V, V0).to(tl.float32)
    store_gathered(sum_ptr, (tl.cast(start, tl.int64) * H + row) * V, inside, total, V, V0)


@tuned(CONFIGS, key=TUNING_KEY)
@triton.jit(do_not_specialize=[*OF_THE_BATCH, "block", "axes"])
def key_gradients_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, tiles_ptr, order_ptr, blocks_ptr, bias_ptr,
                         part_ptr, scale, scale2, block, axes, start, T, S, offset, hidden, window, N, U, place, width,
                         H, G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr,
                         HEADS: tl.constexpr, ROW_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dk and dv of a tile of a block's keys from a segment of its pairs, beside one another in a row."""
    head_tiles: tl.constexpr = (HEADS + ROW_HEADS - 1) // ROW_HEADS
    axis = tl.program_id(2)
    begin, end, key, first, keys, g = block_of_tile(tiles_ptr, order_ptr, blocks_ptr, axis, start, T, S, N, U, H, G,
                                                    HEADS)
    if begin >= end:
        return
    low = tl.program_id(1) * BLOCK_C
    c = low + tl.arange(0, BLOCK_C)
    row = (key + c) * G + g
    k = load_gathered(k_ptr, row * K, c < keys, K, K0)
    v = load_gathered(v_ptr, row * V, c < keys, V, V0)
    dk = tl.zeros([BLOCK_C, K0], tl.float32)
    dv = tl.zeros([BLOCK_C, V0], tl.float32)
    for step in tl.range(0, tl.cdiv(end - begin, BLOCK_M // ROW_HEADS) * head_tiles, 1, disable_licm=True):
        at = begin + step // head_tiles * (BLOCK_M // ROW_HEADS)
        pair, _local, token, h, t, inside = rows_of_tile(order_ptr, at, end, axis, step % head_tiles * ROW_HEADS, start,
                                                        T, offset, N, U, HEADS, ROW_HEADS, BLOCK_M)
        least, last, from_key, to_key = seen_range(t, inside, first, keys, hidden, window)
        if (low <= to_key) & (low + BLOCK_C > from_key):
            q = load_gathered(q_ptr, (token * H + h) * K, inside, K, K0)
            do = load_gathered(do_ptr, (token * H + h) * V, inside, V, V0)
            shift = tl.load(lse_ptr + token * H + h, mask=inside, other=float("inf"))
            if bias_ptr is not None:
                shift -= load_bias(bias_ptr, pair, inside, start, U, N)
            delta = tl.load(delta_ptr + token * H + h, mask=inside, other=0.0)
            seen = c[:, None] <= last[None, :]
            if window is not None:
                seen = seen & (c[:, None] >= least[None, :])
            score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - shift[None, :]
            p = tl.exp2(tl.where(seen, score, float("-inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    to = ((tl.program_id(0).to(tl.int64) * axes + axis) * block + c) * (K + V)
    store_gathered(part_ptr, to, c < keys, dk * scale, K, K0)
    store_gathered(part_ptr, to + K, c < keys, dv, V, V0)


@triton.jit(do_not_specialize=["block", "num_blocks", "axes"])
def add_segments_kernel(part_ptr, first_ptr, blocks_ptr, total_ptr, block, num_blocks, axes, G, W,
                        BLOCK_W: tl.constexpr, ROWS: tl.constexpr):
    """total += the rows of all segments of a block, in their order, for some of its keys and columns."""
    number, axis = tl.program_id(0).to(tl.int64), tl.program_id(2)
    begin, end = tl.load(first_ptr + number), tl.load(first_ptr + number + 1)
    if begin >= end:
        return
    first = tl.load(blocks_ptr + number % num_blocks * 2)
    keys = (tl.load(blocks_ptr + number % num_blocks * 2 + 1) - first).to(tl.int32)
    tiles = tl.cdiv(W, BLOCK_W)
    c = tl.program_id(1) // tiles * ROWS + tl.arange(0, ROWS)
    w = tl.program_id(1) % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (c < keys)[:, None] & (w < W)[None, :]
    total = tl.zeros([ROWS, BLOCK_W], tl.float32)
    for segment in range(begin, end):
        row = (tl.cast(segment, tl.int64) * axes + axis) * block + c
        total += tl.load(part_ptr + row[:, None] * W + w[None, :], mask=inside, other=0.0)
    to = ((first + c) * G + number // num_blocks + axis)[:, None] * W + w[None, :]
    tl.store(total_ptr + to, tl.load(total_ptr + to, mask=inside, other=0.0) + total, mask=inside)


def gradients(sets: Sets, do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, of_bias: bool
              ) -> tuple[Tensor | None, ...]:
    """The gradients of queries, keys, values, keys and values of the window, sinks and biases.

    Args:
        sets: the sets of keys.
        do: gradient of the outputs [B, T, H, V].
        dlse: gradient of the log sums [B, T, H].
        o: outputs.
        lse: log2 of the sums [B, T, H].
        of_bias: that of the biases is needed.
    """
    q, key_dim, value_dim = sets.q, sets.q.shape[3], o.shape[3]
    delta = torch.empty_like(lse)
    sizes_of_rows = row_sizes(value_dim)
    delta_kernel[(triton.cdiv(lse.numel(), sizes_of_rows["ROWS"]),)](
        o_ptr=o, do_ptr=do, dlse_ptr=dlse, delta_ptr=delta, rows=lse.numel(), **sizes_of_rows)
    safe = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp2(score - inf) = 0 where nothing is read
    dq = torch.empty_like(q)
    totals = [torch.zeros(*x.shape[:3], key_dim + value_dim, dtype=torch.float32, device=q.device) for x in sets.keys]
    d_scores = None
    if of_bias and sets.bias is not None:
        d_scores = torch.zeros(sets.batch * sets.queries, sets.heads, sets.bias.shape[3], device=q.device)
    for piece in sets.pieces(key_dim):
        size, cut = piece.stop - piece.start, sets.cut(piece)
        part = torch.empty(size, sets.heads, sets.width, key_dim, dtype=part_dtype(q), device=q.device)
        for keys, pairs, place in cut:
            common = {"q_ptr": q, "k_ptr": keys.k_BSGK, "v_ptr": keys.v_BSGV, "do_ptr": do, "lse_ptr": safe,
                      "delta_ptr": delta, "order_ptr": pairs.order, "blocks_ptr": keys.documents.blocks_P2,
                      "bias_ptr": keys.bias_MUN, "scale": sets.options.scale, "scale2": sets.options.scale * LOG2_E,
                      **sets.numbers(keys, piece.start, place)}
            sizes, key_heads = sets.sizes(keys)
            tiles = pairs.tiles(sizes.pairs(sizes.dq), keys.num_blocks)
            query_gradients_kernel[len(tiles.table), key_heads * sizes.head_tiles(sizes.dq)](
                tiles_ptr=tiles.table, part_ptr=part, d_bias_ptr=None if keys.bias_MUN is None else d_scores, **common,
                **sizes.sizes(sizes.dq))
            total = totals[-1] if keys.window is not None else totals[0]
            _add_key_gradients(keys, pairs, sizes, key_heads, common, total)
        sizes_of_rows = row_sizes(key_dim)
        add_parts_kernel[(triton.cdiv(size * sets.heads, sizes_of_rows["ROWS"]),)](
            part_ptr=part, there_ptr=sets.there(cut, piece), sum_ptr=dq, start=piece.start, rows=size * sets.heads,
            width=sets.width, U=sets.lists, H=sets.heads, **sizes_of_rows)
    found: list[Tensor | None] = [dq]
    for total in totals:
        found += [part.to(q.dtype) for part in total.split([key_dim, value_dim], 3)]
    if len(totals) == 1:
        found += [None, None]
    d_sinks, d_bias = None, None
    if sets.sinks is not None:
        d_sinks = -((sets.sinks - safe / LOG2_E).exp() * delta).sum((0, 1))
    if d_scores is not None and sets.bias is not None:
        d_bias = d_scores.unflatten(1, (sets.lists, -1)).sum(2).view(sets.bias.shape)
    return *found, d_sinks, d_bias


def _add_key_gradients(keys: KeySet, pairs: Pairs, sizes: TileSizes, key_heads: int, common: dict,
                       total: Tensor) -> None:
    """Adds dk and dv of a piece to the total."""
    size = sizes.pairs(sizes.dk)
    segments = pairs.tiles(max(size, max(SEGMENT_ROWS, keys.block) // sizes.heads // size * size), keys.num_blocks)
    groups, columns = keys.k_BSGK.shape[2], total.shape[3]
    part = torch.empty(len(segments.table), key_heads, keys.block, columns, dtype=torch.float32, device=total.device)
    key_gradients_kernel[len(segments.table), triton.cdiv(keys.block, sizes.dk[1]), key_heads](
        tiles_ptr=segments.table, part_ptr=part, block=keys.block, axes=key_heads, **common, **sizes.sizes(sizes.dk))
    width = min(128, triton.next_power_of_2(columns))
    add_segments_kernel[keys.key_heads * keys.num_blocks, triton.cdiv(keys.block, 16) * triton.cdiv(columns, width),
                        key_heads](
        part_ptr=part, first_ptr=segments.first_X1, blocks_ptr=keys.documents.blocks_P2, total_ptr=total,
        block=keys.block, num_blocks=keys.num_blocks, axes=key_heads, G=groups, W=columns, BLOCK_W=width, ROWS=16)


def _compile_cases() -> list[CompileCase]:
    types, found = compile_types(), []
    for dim in (64, 128):
        sizes = TileSizes.of(torch.bfloat16, dim, dim, 16)
        found += [CompileCase(f"listed dq, 16 heads of {dim}", query_gradients_kernel, types,
                              {"K": dim, "V": dim} | sizes.sizes(sizes.dq), head_dim=dim),
                  CompileCase(f"listed dk, dv, 16 heads of {dim}", key_gradients_kernel, types | {"part_ptr": "*fp32"},
                              {"K": dim, "V": dim} | sizes.sizes(sizes.dk), head_dim=dim)]
    return [*found, CompileCase("listed: delta", delta_kernel, types, row_sizes(128)),
            CompileCase("listed: sums over lists", add_parts_kernel, types, row_sizes(128)),
            CompileCase("listed: sums over segments", add_segments_kernel, types | {"part_ptr": "*fp32"},
                        {"BLOCK_W": 128, "ROWS": 16}, ("W",))]


COMPILE_CASES = _compile_cases()
