"""Attention over selected keys as Triton kernels, forward and backward.

A program holds the query heads of one token and one key head, and gathers the keys that the token lists. The backward
goes by blocks of queries: dq beside the probabilities and their gradients; then dk and dv for each listed place; then
the sums of these over the queries that chose a key (`triton_inverse`).

M tokens of all rows, B rows of T queries and S keys, H query heads, G key/value heads, R = H/G, K key dim (as K0 + K1,
powers of two), V value dim, N selected keys per query, L list entries per query in work buffers (N rounded up), Q
queries of a block, W = K + V columns (K alone where the values are the first dims of the keys).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.sparse_attention.triton_inverse import InverseLists, queries_per_block
from hybridlm_kernels.ops.sparse_attention.triton_tiles import (
    LOG2_E,
    TileSizes,
    heads_of,
    load_rows,
    softmax_step,
    split_dim,
    store_rows,
    tuned_by_listed,
)
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase, tuned

MIN_SHARED_DIM = 32  # values that are part of the keys: products take half of their dims, 16 or more


@tuned_by_listed((64, 4, 3), (64, 8, 3), (32, 8, 3), (64, 8, 1), (16, 8, 1))
@triton.jit
def _forward(q_ptr, k_ptr, v_ptr, index_ptr, o_ptr, lse_ptr, scale, T, S, N, H, G, K: tl.constexpr, V: tl.constexpr,
             K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """o and the log2 of the sum of exp2. `scale` includes log2 e."""
    token = tl.program_id(0).to(tl.int64)
    g, head, h, has = heads_of(tl.program_id(1), H, G, BLOCK_H)
    head += token * H
    c0, c1, cv = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1)), tl.arange(0, V0)
    q_ptr += head * K
    q0 = load_rows(q_ptr, h * K, has, c0, 0, K)
    if K1 > 0:
        q1 = load_rows(q_ptr, h * K, has, c1, K0, K)
    keys = k_ptr + (token // T * S * G + g) * K
    values = v_ptr + (token // T * S * G + g) * V
    index_ptr += token * N
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    o = tl.zeros([BLOCK_H, V0], tl.float32)
    for begin in tl.range(0, N, BLOCK_N, disable_licm=True):
        n = begin + tl.arange(0, BLOCK_N)
        s = tl.load(index_ptr + n, mask=n < N, other=-1)
        row = tl.maximum(s, 0).to(tl.int64) * G
        score = tl.dot(q0, tl.trans(load_rows(keys, row * K, s >= 0, c0, 0, K)), input_precision="ieee")
        if K1 > 0:
            k1 = load_rows(keys, row * K, s >= 0, c1, K0, K)
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        most, total, p, shrink = softmax_step(score * scale, s >= 0, most, total)
        v = load_rows(values, row * V, s >= 0, cv, 0, V)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    some = total > 0
    o = o / tl.where(some, total, 1.0)[:, None]
    store_rows(o_ptr + head * V, h * V, has, cv, 0, V, o)
    tl.store(lse_ptr + head + h, tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), 0.0), mask=has)


_FORWARD_ABSORBED = [triton.Config({"BLOCK_N": n, "PARTS": parts}, num_warps=8, num_stages=stages)
                     for n, parts, stages in ((64, 2, 3), (64, 1, 2), (32, 1, 3), (32, 1, 1), (16, 1, 1))]


@tuned(_FORWARD_ABSORBED, key=["H", "G", "K", "V"])
@triton.jit
def _forward_absorbed(q_ptr, k_ptr, index_ptr, o_ptr, lse_ptr, scale, T, S, N, H, G, K: tl.constexpr, V: tl.constexpr,
                      K0: tl.constexpr, K1: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
                      PARTS: tl.constexpr):
    """`_forward` where the first V = K0 dims of the keys are the values: what was gathered serves both products.

    Two PARTS of these dims share the places of rows, without which 64 keys of 512 + 64 dims do not fit the registers of
    Hopper; Blackwell's tensor memory holds one part alone.
    """
    token = tl.program_id(0).to(tl.int64)
    g, head, h, has = heads_of(tl.program_id(1), H, G, BLOCK_H)
    head += token * H
    WIDTH: tl.constexpr = K0 // PARTS
    c0, c1 = tl.arange(0, WIDTH), K0 + tl.arange(0, max(K1, 1))
    q_ptr += head * K
    qa = load_rows(q_ptr, h * K, has, c0, 0, K)
    if PARTS == 2:
        qb = load_rows(q_ptr + WIDTH, h * K, has, c0, 0, K)
    if K1 > 0:
        q1 = load_rows(q_ptr, h * K, has, c1, K0, K)
    keys = k_ptr + (token // T * S * G + g) * K
    index_ptr += token * N
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    oa = tl.zeros([BLOCK_H, WIDTH], tl.float32)
    if PARTS == 2:
        ob = tl.zeros([BLOCK_H, WIDTH], tl.float32)
    for begin in tl.range(0, N, BLOCK_N, disable_licm=True):
        n = begin + tl.arange(0, BLOCK_N)
        s = tl.load(index_ptr + n, mask=n < N, other=-1)
        row = tl.maximum(s, 0).to(tl.int64) * (G * K)
        ka = load_rows(keys, row, s >= 0, c0, 0, K)
        score = tl.dot(qa, tl.trans(ka), input_precision="ieee")
        if PARTS == 2:
            kb = load_rows(keys + WIDTH, row, s >= 0, c0, 0, K)
            score = tl.dot(qb, tl.trans(kb), score, input_precision="ieee")
        if K1 > 0:
            k1 = load_rows(keys, row, s >= 0, c1, K0, K)
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        most, total, p, shrink = softmax_step(score * scale, s >= 0, most, total)
        oa = tl.dot(p.to(ka.dtype), ka, oa * shrink[:, None], input_precision="ieee")
        if PARTS == 2:
            ob = tl.dot(p.to(kb.dtype), kb, ob * shrink[:, None], input_precision="ieee")
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    o_ptr += head * V
    store_rows(o_ptr, h * V, has, c0, 0, V, oa / divisor[:, None])
    if PARTS == 2:
        store_rows(o_ptr + WIDTH, h * V, has, c0, 0, V, ob / divisor[:, None])
    tl.store(lse_ptr + head + h, tl.where(some, most + tl.log2(divisor), 0.0), mask=has)


@tuned_by_listed((64, 4, 3), (64, 8, 1), (32, 8, 3), (16, 8, 1))
@triton.jit(do_not_specialize=["start"])
def _backward_scores(q_ptr, k_ptr, v_ptr, index_ptr, o_ptr, do_ptr, lse_ptr, p_ptr, ds_ptr, scale, scale2, start, T, S,
                     N, L, H, G, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
                     V0: tl.constexpr, SHARED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """For each listed place the probability, and the gradient at q . k. `scale2` = scale log2 e."""
    local = tl.program_id(0).to(tl.int64)
    token = start + local
    g, first, h, has = heads_of(tl.program_id(1), H, G, BLOCK_H)
    head = token * H + first
    c0, c1, cv = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1)), tl.arange(0, V0)
    do = load_rows(do_ptr + head * V, h * V, has, cv, 0, V)
    delta = tl.sum(do.to(tl.float32) * load_rows(o_ptr + head * V, h * V, has, cv, 0, V).to(tl.float32), 1)
    lse = tl.load(lse_ptr + head + h, mask=has, other=0.0)
    q_ptr += head * K
    q0 = load_rows(q_ptr, h * K, has, c0, 0, K)
    if K1 > 0:
        q1 = load_rows(q_ptr, h * K, has, c1, K0, K)
    keys = k_ptr + (token // T * S * G + g) * K
    values = v_ptr + (token // T * S * G + g) * V
    index_ptr += token * N
    p_ptr += (local * H + first) * L
    ds_ptr += (local * H + first) * L
    for begin in tl.range(0, N, BLOCK_N, disable_licm=True):
        n = begin + tl.arange(0, BLOCK_N)
        s = tl.load(index_ptr + n, mask=n < N, other=-1)
        row = tl.maximum(s, 0).to(tl.int64) * G
        k0 = load_rows(keys, row * K, s >= 0, c0, 0, K)
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee") * scale2 - lse[:, None]
        if K1 > 0:
            # A sum of its own: a product that goes into another is computed by both groups of four warps, in full.
            k1 = load_rows(keys, row * K, s >= 0, c1, K0, K)
            score += tl.dot(q1, tl.trans(k1), input_precision="ieee") * scale2
        if SHARED:
            dp = tl.dot(do, tl.trans(k0), input_precision="ieee")
        else:
            v = load_rows(values, row * V, s >= 0, cv, 0, V)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        p = tl.exp2(tl.where((s >= 0)[None, :], score, float("-inf")))
        at_place = (h * L)[:, None] + n[None, :]
        inside = has[:, None] & (n < L)[None, :]
        tl.store(p_ptr + at_place, p.to(p_ptr.dtype.element_ty), mask=inside)
        tl.store(ds_ptr + at_place, (p * (dp - delta[:, None]) * scale).to(ds_ptr.dtype.element_ty), mask=inside)


@tuned_by_listed((64, 4, 3), (64, 8, 3), (32, 4, 3), (32, 8, 1), (16, 8, 1))
@triton.jit(do_not_specialize=["start"])
def _backward_queries(k_ptr, index_ptr, ds_ptr, dq_ptr, start, T, S, N, L, H, G, K: tl.constexpr, V: tl.constexpr,
                      K0: tl.constexpr, K1: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq = sum over the listed places of ds k."""
    local = tl.program_id(0).to(tl.int64)
    token = start + local
    g, first, h, has = heads_of(tl.program_id(1), H, G, BLOCK_H)
    c0, c1 = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1))
    keys = k_ptr + (token // T * S * G + g) * K
    index_ptr += token * N
    ds_ptr += (local * H + first) * L
    dq0 = tl.zeros([BLOCK_H, K0], tl.float32)
    if K1 > 0:
        dq1 = tl.zeros([BLOCK_H, K1], tl.float32)
    for begin in tl.range(0, N, BLOCK_N, disable_licm=True):
        n = begin + tl.arange(0, BLOCK_N)
        s = tl.load(index_ptr + n, mask=n < N, other=-1)
        row = tl.maximum(s, 0).to(tl.int64) * (G * K)
        ds = tl.load(ds_ptr + (h * L)[:, None] + n[None, :], mask=has[:, None] & (n < L)[None, :], other=0.0)
        dq0 = tl.dot(ds, load_rows(keys, row, s >= 0, c0, 0, K), dq0, input_precision="ieee")
        if K1 > 0:
            dq1 = tl.dot(ds, load_rows(keys, row, s >= 0, c1, K0, K), dq1, input_precision="ieee")
    dq_ptr += (token * H + first) * K
    store_rows(dq_ptr, h * K, has, c0, 0, K, dq0)
    if K1 > 0:
        store_rows(dq_ptr, h * K, has, c1, K0, K, dq1)


@tuned([triton.Config({}, num_warps=4, num_stages=3), triton.Config({}, num_warps=8, num_stages=3),
        triton.Config({}, num_warps=4, num_stages=1), triton.Config({}, num_warps=8, num_stages=1)],
       key=["H", "G", "K", "V"])
@triton.jit(do_not_specialize=["start"])
def _backward_pairs(q_ptr, do_ptr, p_ptr, ds_ptr, pair_ptr, start, N, L, H, G, K: tl.constexpr, V: tl.constexpr,
                    K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, SHARED: tl.constexpr, BLOCK_H: tl.constexpr,
                    BLOCK_N: tl.constexpr):
    """Gradient of the key (and after it, or added to it, of the value) at each listed place, over the heads."""
    local, g = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c0, c1, cv = tl.arange(0, K0), K0 + tl.arange(0, max(K1, 1)), tl.arange(0, V0)
    dk0 = tl.zeros([BLOCK_N, K0], tl.float32)
    if K1 > 0:
        dk1 = tl.zeros([BLOCK_N, K1], tl.float32)
    # two loops: of two products into one sum in a loop the compiler would keep two copies
    for begin in tl.range(0, H // G, BLOCK_H, disable_licm=True):
        in_group = begin + tl.arange(0, BLOCK_H)
        has, h = in_group < H // G, g * (H // G) + in_group
        ds = tl.load(ds_ptr + ((local * H + h) * L)[None, :] + n[:, None], mask=has[None, :] & (n < L)[:, None],
                     other=0.0)
        at = ((start + local) * H + h) * K
        dk0 = tl.dot(ds, load_rows(q_ptr, at, has, c0, 0, K), dk0, input_precision="ieee")
        if K1 > 0:
            dk1 = tl.dot(ds, load_rows(q_ptr, at, has, c1, K0, K), dk1, input_precision="ieee")
    dv = dk0
    if not SHARED:
        dv = tl.zeros([BLOCK_N, V0], tl.float32)
    for begin in tl.range(0, H // G, BLOCK_H, disable_licm=True):
        in_group = begin + tl.arange(0, BLOCK_H)
        has, h = in_group < H // G, g * (H // G) + in_group
        p = tl.load(p_ptr + ((local * H + h) * L)[None, :] + n[:, None], mask=has[None, :] & (n < L)[:, None],
                    other=0.0)
        do = load_rows(do_ptr, ((start + local) * H + h) * V, has, cv, 0, V)
        dv = tl.dot(p, do, dv, input_precision="ieee")
    to = ((local * N + n) * G + g) * (K if SHARED else K + V)
    store_rows(pair_ptr, to, n < N, c0, 0, K, dv if SHARED else dk0)
    if K1 > 0:
        store_rows(pair_ptr, to, n < N, c1, K0, K, dk1)
    if not SHARED:
        store_rows(pair_ptr, to + K, n < N, cv, 0, V, dv)


def sparse_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor,
                     scale: float | None = None) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    value_dim, out_dtype = v_BSGV.shape[3], v_BSGV.dtype
    dtype = torch.promote_types(torch.promote_types(q_BTHK.dtype, k_BSGK.dtype), out_dtype)
    shared = values_are_keys(k_BSGK, v_BSGV)
    q, k = q_BTHK.to(dtype).contiguous(), k_BSGK.to(dtype).contiguous()
    v = None if shared else v_BSGV.to(dtype).contiguous()
    return _TritonSparseAttention.apply(q, k, v, indices_BTN.int().contiguous(), scale, value_dim).to(out_dtype)


def values_are_keys(k_BSGK: Tensor, v_BSGV: Tensor) -> bool:
    """Whether v is the slice k[..., :V] and nothing else, so that its gradient may go straight to k.

    Absorbed MLA: the latent is key and value. V must be the power of two that K is split at, and 32 or more.
    """
    value_dim = v_BSGV.shape[3]
    same = k_BSGK.data_ptr() == v_BSGV.data_ptr() and k_BSGK.stride() == v_BSGV.stride()
    if not same or k_BSGK.dtype != v_BSGV.dtype or value_dim < MIN_SHARED_DIM or (
            value_dim != split_dim(k_BSGK.shape[3])[0]):
        return False
    if not (torch.is_grad_enabled() and (k_BSGK.requires_grad or v_BSGV.requires_grad)):
        return True
    node = v_BSGV.grad_fn
    source = node.next_functions[0][0] if node is not None and node.name() == "SliceBackward0" else None
    return source is not None and (source is k_BSGK.grad_fn or getattr(source, "variable", None) is k_BSGK)


class _TritonSparseAttention(torch.autograd.Function):
    """Attention to listed keys; v is None where the values are the first dims of the keys."""

    @staticmethod
    def forward(ctx, q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale, value_dim):
        batch, queries, heads, key_dim = q_BTHK.shape
        keys, groups = k_BSGK.shape[1:3]
        tile = TileSizes.of(q_BTHK.dtype, key_dim, value_dim, heads // groups)
        o_BTHV = torch.empty(batch, queries, heads, value_dim, dtype=q_BTHK.dtype, device=q_BTHK.device)
        lse_BTH = torch.empty(batch, queries, heads, dtype=torch.float32, device=q_BTHK.device)
        tiles = groups * triton.cdiv(heads // groups, tile.BLOCK_H)
        arguments = {"q_ptr": q_BTHK, "k_ptr": k_BSGK, "index_ptr": indices_BTN, "o_ptr": o_BTHV, "lse_ptr": lse_BTH,
                     "scale": scale * LOG2_E, "T": queries, "S": keys, "N": indices_BTN.shape[2], "H": heads,
                     "G": groups, "K": key_dim, "V": value_dim}
        sizes = tile.dims()
        if v_BSGV is None:
            del sizes["V0"]
            _forward_absorbed[(batch * queries, tiles)](**arguments, **sizes)
        else:
            _forward[(batch * queries, tiles)](**arguments, v_ptr=v_BSGV, **sizes)
        ctx.save_for_backward(q_BTHK, k_BSGK, v_BSGV, indices_BTN, o_BTHV, lse_BTH)
        ctx.scale = scale
        return o_BTHV

    @staticmethod
    @plain_backward
    def backward(ctx, do_BTHV):
        q, k, v, indices, o, lse = ctx.saved_tensors
        return (*_gradients(do_BTHV.contiguous(), q, k, v, indices, o, lse, ctx.scale), None, None, None)


def _gradients(do_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor | None, indices_BTN: Tensor,
               o_BTHV: Tensor, lse_BTH: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, queries, heads, key_dim = q_BTHK.shape
    keys, groups, value_dim, listed = k_BSGK.shape[1], k_BSGK.shape[2], o_BTHV.shape[3], indices_BTN.shape[2]
    tile = TileSizes.of(q_BTHK.dtype, key_dim, value_dim, heads // groups)
    dims = {"K": key_dim, "V": value_dim, "SHARED": v_BSGV is None}
    places, width = triton.cdiv(listed, 16) * 16, key_dim + (0 if v_BSGV is None else value_dim)
    pair_dtype = q_BTHK.dtype if q_BTHK.dtype == torch.bfloat16 else torch.float32
    most = queries_per_block(queries, keys, 2 * heads * places * q_BTHK.element_size()
                              + listed * groups * width * pair_dtype.itemsize)

    def empty(*shape: int, dtype: torch.dtype = q_BTHK.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q_BTHK.device)

    p_QHL, ds_QHL = empty(most, heads, places), empty(most, heads, places)
    pair_MX = empty(most * listed, groups * width, dtype=pair_dtype)
    dq_BTHK = empty(*q_BTHK.shape)
    total_BSX = torch.zeros(batch, keys, groups * width, dtype=torch.float32, device=q_BTHK.device)
    tiles = groups * triton.cdiv(heads // groups, tile.BLOCK_H)
    for row in range(batch):
        for begin in range(0, queries, most):
            size, start = min(most, queries - begin), row * queries + begin
            _backward_scores[(size, tiles)](
                q_ptr=q_BTHK, k_ptr=k_BSGK, v_ptr=k_BSGK if v_BSGV is None else v_BSGV, index_ptr=indices_BTN,
                o_ptr=o_BTHV, do_ptr=do_BTHV, lse_ptr=lse_BTH, p_ptr=p_QHL, ds_ptr=ds_QHL, scale=scale,
                scale2=scale * LOG2_E, start=start, T=queries, S=keys, N=listed, L=places, H=heads, G=groups, **dims,
                **tile.dims())
            _backward_queries[(size, tiles)](
                k_ptr=k_BSGK, index_ptr=indices_BTN, ds_ptr=ds_QHL, dq_ptr=dq_BTHK, start=start, T=queries, S=keys,
                N=listed, L=places, H=heads, G=groups, K=key_dim, V=value_dim, K0=tile.K0, K1=tile.K1,
                BLOCK_H=tile.BLOCK_H)
            _backward_pairs[(triton.cdiv(listed, tile.BLOCK_N), size, groups)](
                q_ptr=q_BTHK, do_ptr=do_BTHV, p_ptr=p_QHL, ds_ptr=ds_QHL, pair_ptr=pair_MX, start=start, N=listed,
                L=places, H=heads, G=groups, **dims, **tile.sizes(BLOCK_H=32))
            InverseLists(indices_BTN[row, begin : begin + size], keys).add(pair_MX, total_BSX[row])
    total_BSGW = total_BSX.view(batch, keys, groups, width)
    dv_BSGV = None if v_BSGV is None else total_BSGW[..., key_dim:].to(v_BSGV.dtype)
    return dq_BTHK, total_BSGW[..., :key_dim].to(k_BSGK.dtype), dv_BSGV


def _compile_cases() -> list[CompileCase]:
    types = {"scale": "fp32", "scale2": "fp32", "index_ptr": "*i32", "lse_ptr": "*fp32"}
    types |= dict.fromkeys(("start", "T", "S", "N", "L", "H", "G"), "i32")
    types |= {f"{x}_ptr": "*bf16" for x in ("q", "k", "v", "o", "do", "dq", "p", "ds", "pair")}
    found = []
    for label, heads, groups, key_dim, value_dim, shared in (
            ("MLA 128 x 512+64", 128, 1, 576, 512, True), ("GQA 16/2 x 256", 16, 2, 256, 256, False),
            ("GQA 32/4 x 128", 32, 4, 128, 128, False), ("GQA 32/4 x 64", 32, 4, 64, 64, False)):
        tile = TileSizes.of(torch.bfloat16, key_dim, value_dim, heads // groups)
        dims = {"K": key_dim, "V": value_dim}
        for name, kernel, sizes in (("forward", _forward_absorbed if shared else _forward, tile.dims()),
                                    ("scores backward", _backward_scores, tile.dims()),
                                    ("dq", _backward_queries, tile.dims()),
                                    ("dk, dv", _backward_pairs, tile.sizes(BLOCK_H=32))):
            constants = {name: value for name, value in (dims | sizes | {"SHARED": shared}).items()
                         if name in kernel.fn.arg_names}
            found.append(CompileCase(f"sparse {name}, {label}", kernel, types, constants, ("N", "L"),
                                     head_dim=key_dim if key_dim in (64, 128) else 0))
    return found


COMPILE_CASES = _compile_cases()
