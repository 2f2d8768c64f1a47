"""Attention of each query to a range of keys as Triton kernels, forward and backward; scores stay in registers.

A tile of rows holds the query heads of one key head, of as many consecutive queries as fit, so that their keys are read
once for all of them. Ranges do not fall along a row: the keys of a tile of queries, and the queries of a tile of keys,
are consecutive. No sum is made by atomics.

B rows, T queries, E keys, H query heads, G key/value heads, R = H/G, K key dim, V value dim, P tiles of keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.range_attention import MAX_TRITON_HEAD_DIM
from hybridlm_kernels.ops.selected_attention.triton_forward import load_gathered, row_sizes, store_gathered
from hybridlm_kernels.ops.selected_attention.triton_gradients import delta_kernel
from hybridlm_kernels.ops.sparse_attention.triton_tiles import LOG2_E
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, tuned

_OF_THE_BATCH = ["T", "E"]
_KEY = ["H", "G", "K", "V", "BLOCK_M"]
_CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((4, 2), (8, 2), (8, 1))]


@triton.jit
def _find_rows(first_ptr, count_ptr, m, T, H, G):
    """Rows m of a key head: their place in [B, T, H], whether they exist, and the range of keys of each."""
    heads = H // G
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1)
    inside = m < tl.cast(T, tl.int64) * heads
    token = b * T + tl.minimum(m // heads, T - 1)
    low = tl.load(first_ptr + token)
    high = low + tl.load(count_ptr + token)
    return token * H + g * heads + m % heads, inside, low, tl.where(inside, high, low)


@triton.jit
def _range_of_tile(low, high, E):
    """The first key that one of the rows sees, and the first behind all."""
    some = high > low
    return tl.min(tl.where(some, low, E), 0), tl.max(tl.where(some, high, 0), 0)


@tuned(_CONFIGS, key=_KEY)
@triton.jit(do_not_specialize=_OF_THE_BATCH)
def forward_kernel(q_ptr, k_ptr, v_ptr, first_ptr, count_ptr, o_ptr, lse_ptr, scale2, T, E, H, G, K: tl.constexpr,
                   V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write o and log2 of the sum of exp2, -inf where nothing is seen. `scale2` = scale log2 e."""
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # later queries see more keys, and start first
    row, inside, low, high = _find_rows(first_ptr, count_ptr, tile * BLOCK_M + tl.arange(0, BLOCK_M), T, H, G)
    begin, end = _range_of_tile(low, high, E)
    key = tl.program_id(2).to(tl.int64) * E
    q = load_gathered(q_ptr, row * K, inside, K, K0)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, V0], tl.float32)
    for at in tl.range(begin, end, BLOCK_E, disable_licm=True):
        e = at + tl.arange(0, BLOCK_E)
        at_key = (key + e) * G + tl.program_id(1)
        k = load_gathered(k_ptr, at_key * K, e < end, K, K0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        seen = (e[None, :] >= low[:, None]) & (e[None, :] < high[:, None])
        score = tl.where(seen, score, float("-inf"))
        above = tl.maximum(most, tl.max(score, 1))
        pivot = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2(score - pivot[:, None])
        shrink = tl.exp2(most - pivot)
        v = load_gathered(v_ptr, at_key * V, e < end, V, V0)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        most = above
    some = high > low
    store_gathered(o_ptr, row * V, inside, o / tl.where(some, total, 1.0)[:, None], V, V0)
    lse = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + row, lse, mask=inside)


@tuned(_CONFIGS, key=_KEY)
@triton.jit(do_not_specialize=_OF_THE_BATCH)
def query_gradients_kernel(q_ptr, k_ptr, v_ptr, first_ptr, count_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, scale, scale2,
                           T, E, H, G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write dq. `scale2` = scale log2 e."""
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    row, inside, low, high = _find_rows(first_ptr, count_ptr, tile * BLOCK_M + tl.arange(0, BLOCK_M), T, H, G)
    begin, end = _range_of_tile(low, high, E)
    key = tl.program_id(2).to(tl.int64) * E
    q = load_gathered(q_ptr, row * K, inside, K, K0)
    do = load_gathered(do_ptr, row * V, inside, V, V0)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, K0], tl.float32)
    for at in tl.range(begin, end, BLOCK_E, disable_licm=True):
        e = at + tl.arange(0, BLOCK_E)
        at_key = (key + e) * G + tl.program_id(1)
        k = load_gathered(k_ptr, at_key * K, e < end, K, K0)
        v = load_gathered(v_ptr, at_key * V, e < end, V, V0)
        seen = (e[None, :] >= low[:, None]) & (e[None, :] < high[:, None])
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse[:, None]
        p = tl.exp2(tl.where(seen, score, float("-inf")))
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_gathered(dq_ptr, row * K, inside, dq * scale, K, K0)


@tuned(_CONFIGS, key=_KEY)
@triton.jit(do_not_specialize=_OF_THE_BATCH)
def key_gradients_kernel(q_ptr, k_ptr, v_ptr, first_ptr, count_ptr, queries_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr,
                         dv_ptr, scale, scale2, T, E, H, G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr,
                         V0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write dk and dv of a tile of keys, from the queries that `queries_ptr` [B, P, 2] gives for it."""
    b, tile = tl.program_id(2).to(tl.int64), tl.program_id(0)
    e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    at_key = (b * E + e) * G + tl.program_id(1)
    k = load_gathered(k_ptr, at_key * K, e < E, K, K0)
    v = load_gathered(v_ptr, at_key * V, e < E, V, V0)
    dk = tl.zeros([BLOCK_E, K0], tl.float32)
    dv = tl.zeros([BLOCK_E, V0], tl.float32)
    of_tile = queries_ptr + (b * tl.num_programs(0) + tile) * 2
    heads = H // G
    begin, end = tl.load(of_tile).to(tl.int64) * heads, tl.load(of_tile + 1).to(tl.int64) * heads
    for at in tl.range(begin, end, BLOCK_M, disable_licm=True):
        row, inside, low, high = _find_rows(first_ptr, count_ptr, at + tl.arange(0, BLOCK_M), T, H, G)
        q = load_gathered(q_ptr, row * K, inside, K, K0)
        do = load_gathered(do_ptr, row * V, inside, V, V0)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        seen = (e[:, None] >= low[None, :]) & (e[:, None] < high[None, :])
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :]
        p = tl.exp2(tl.where(seen, score, float("-inf")))
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_gathered(dk_ptr, at_key * K, e < E, dk * scale, K, K0)
    store_gathered(dv_ptr, at_key * V, e < E, dv, V, V0)


class TileSizes(NamedTuple):
    """Compile-time sizes of head dims and tiles; `forward`, `dq` and `dk` are rows and keys of a tile."""

    K0: int
    V0: int
    forward: tuple[int, int]
    dq: tuple[int, int]
    dk: tuple[int, int]

    @classmethod
    def of(cls, dtype: torch.dtype, key_dim: int, value_dim: int) -> TileSizes:
        """Sizes for a dtype and head dims."""
        K0, V0 = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
        widest = max(K0, V0)
        if dtype == torch.float32:
            keys = 16 if widest > 128 else 32
            return cls(K0, V0, (32, keys), (32, keys), (keys, keys))
        if widest > 128:
            return cls(K0, V0, (64, 32), (64, 32), (32, 32))
        return cls(K0, V0, (64, 64), (64, 64), (32, 64))

    def sizes(self, tile: tuple[int, int]) -> dict[str, int]:
        """The sizes by the names of kernel arguments."""
        return {"K0": self.K0, "V0": self.V0, "BLOCK_M": tile[0], "BLOCK_E": tile[1]}


def range_attention(q_BTHK: Tensor, k_BEGK: Tensor, v_BEGV: Tensor, first_BT: Tensor, count_BT: Tensor,
                    scale: float) -> tuple[Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked."""
    dtype = torch.promote_types(torch.promote_types(q_BTHK.dtype, k_BEGK.dtype), v_BEGV.dtype)
    q, k, v = (x.to(dtype).contiguous() for x in (q_BTHK, k_BEGK, v_BEGV))
    first, count = (x.to(torch.int32).contiguous() for x in (first_BT, count_BT))
    o, lse = _TritonRangeAttention.apply(q, k, v, first, count, scale)
    return o.to(v_BEGV.dtype), lse


class _TritonRangeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, count: Tensor,
                scale: float) -> tuple[Tensor, Tensor]:
        (batch, queries, heads, key_dim), groups, value_dim = q.shape, k.shape[2], v.shape[3]
        sizes = TileSizes.of(q.dtype, key_dim, value_dim)
        o = torch.empty(batch, queries, heads, value_dim, dtype=q.dtype, device=q.device)
        lse2 = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
        tiles = triton.cdiv(queries * (heads // groups), sizes.forward[0])
        forward_kernel[(tiles, groups, batch)](
            q_ptr=q, k_ptr=k, v_ptr=v, first_ptr=first, count_ptr=count, o_ptr=o, lse_ptr=lse2, scale2=scale * LOG2_E,
            **_numbers(q, k, v), **sizes.sizes(sizes.forward))
        ctx.save_for_backward(q, k, v, first, count, o, lse2)
        ctx.scale = scale
        return o, lse2 / LOG2_E

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first, count, o, lse2 = ctx.saved_tensors
        (batch, queries, heads, key_dim), groups, value_dim = q.shape, k.shape[2], v.shape[3]
        sizes = TileSizes.of(q.dtype, key_dim, value_dim)
        do, delta = do.contiguous(), torch.empty_like(lse2)
        sizes_of_rows = row_sizes(value_dim)
        delta_kernel[(triton.cdiv(lse2.numel(), sizes_of_rows["ROWS"]),)](
            o_ptr=o, do_ptr=do, dlse_ptr=dlse.contiguous(), delta_ptr=delta, rows=lse2.numel(), **sizes_of_rows)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        common = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "first_ptr": first, "count_ptr": count, "do_ptr": do,
                  "lse_ptr": lse2, "delta_ptr": delta, "scale": ctx.scale, "scale2": ctx.scale * LOG2_E,
                  **_numbers(q, k, v)}
        tiles = triton.cdiv(queries * (heads // groups), sizes.dq[0])
        query_gradients_kernel[(tiles, groups, batch)](dq_ptr=dq, **common, **sizes.sizes(sizes.dq))
        seen_by = queries_of_tiles(first, count, k.shape[1], sizes.dk[1])
        key_gradients_kernel[(seen_by.shape[1], groups, batch)](
            queries_ptr=seen_by, dk_ptr=dk, dv_ptr=dv, **common, **sizes.sizes(sizes.dk))
        return dq, dk, dv, None, None, None


def queries_of_tiles(first_BT: Tensor, count_BT: Tensor, keys: int, block: int) -> Tensor:
    """The queries that see a key of each tile: the first one and the first behind them, int32 [B, P, 2].

    >>> queries_of_tiles(torch.tensor([[0, 0, 2]]), torch.tensor([[1, 2, 2]]), 4, 2)
    tensor([[[0, 2],
             [2, 3]]], dtype=torch.int32)
    """
    start_P = torch.arange(0, keys, block, dtype=first_BT.dtype, device=first_BT.device)
    start_BP = start_P.expand(first_BT.shape[0], -1).contiguous()
    begin_BP = torch.searchsorted((first_BT + count_BT).contiguous(), start_BP, right=True)
    end_BP = torch.searchsorted(first_BT.contiguous(), start_BP + block)
    return torch.stack([begin_BP, end_BP], -1).to(torch.int32)


def _numbers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    return {"T": q.shape[1], "E": k.shape[1], "H": q.shape[2], "G": k.shape[2], "K": q.shape[3], "V": v.shape[3]}


def _compile_cases() -> list[CompileCase]:
    types = dict.fromkeys(("T", "E", "H", "G"), "i32") | {"scale": "fp32", "scale2": "fp32"}
    types |= {f"{x}_ptr": "*bf16" for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv")}
    types |= {f"{x}_ptr": "*i32" for x in ("first", "count", "queries")}
    types |= {f"{x}_ptr": "*fp32" for x in ("lse", "delta")}
    found = []
    for dim in (64, 128, MAX_TRITON_HEAD_DIM):
        sizes = TileSizes.of(torch.bfloat16, dim, dim)
        for name, kernel, tile in (("forward", forward_kernel, sizes.forward), ("dq", query_gradients_kernel, sizes.dq),
                                   ("dk, dv", key_gradients_kernel, sizes.dk)):
            found.append(CompileCase(f"{name}, D={dim}", kernel, types, {"K": dim, "V": dim} | sizes.sizes(tile),
                                     head_dim=dim))
    return found


COMPILE_CASES = _compile_cases()
