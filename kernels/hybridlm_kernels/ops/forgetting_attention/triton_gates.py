"""Sums of forget gates along documents as Triton kernels, and the gradient of the gates from that of the sums.

A sum is a pair of fp32 numbers, high + low, of 48 bits: the difference of two sums of a long document keeps the bits of
the gates between them. Sums start at zero in every document, so that nothing of another document is in their bits.

B rows, T queries and S keys per row (the queries are the last T positions), M queries and L keys of all rows, H query
heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.forgetting_attention.torch_backend import LOWEST_LOG_GATE
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.triton_scan import document_tiles
from hybridlm_kernels.recurrence.triton_tiles import LOG2_E
from hybridlm_kernels.triton_support import CompileCase

TOKENS_PER_STEP = 1024  # of a document, which one program goes over
_LOWEST = tl.constexpr(LOWEST_LOG_GATE)


@triton.jit
def _find_document(documents_ptr, T, S):
    """The document of a program: its first query and key, and the numbers of its queries and keys."""
    document = tl.program_id(0).to(tl.int64)
    first_query, first_key = document * T, document * S
    queries, keys = T.to(tl.int64), S.to(tl.int64)
    if documents_ptr is not None:
        first_query = tl.load(documents_ptr + document * 3)
        first_key = first_query
        queries = tl.load(documents_ptr + document * 3 + 1)
        keys = queries
    return first_query, first_key, queries, keys


@triton.jit(do_not_specialize=["T", "S", "num_keys"])
def sum_gates_kernel(g_ptr, documents_ptr, high_ptr, low_ptr, T, S, num_keys, H, BLOCK: tl.constexpr):
    """Write the sums of the log2 gates up to each key, [H, L]; g is [L, H], in natural units."""
    _, first, _, length = _find_document(documents_ptr, T, S)
    h = tl.program_id(1).to(tl.int64)
    before = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    for start in range(0, length, BLOCK):
        s = start + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + (first + s) * H + h, mask=s < length, other=0.0).to(tl.float64)
        g = tl.where(g < _LOWEST, _LOWEST, g) * LOG2_E
        total = before + tl.cumsum(g, 0)
        high = total.to(tl.float32)
        at = h * num_keys + first + s
        tl.store(high_ptr + at, high, mask=s < length)
        tl.store(low_ptr + at, (total - high.to(tl.float64)).to(tl.float32), mask=s < length)
        before += tl.sum(g, 0)


@triton.jit(do_not_specialize=["T", "S", "num_queries", "num_keys"])
def gate_gradients_kernel(g_ptr, documents_ptr, of_queries_ptr, of_keys_ptr, dg_ptr, T, S, num_queries, num_keys, H,
                          BLOCK: tl.constexpr):
    """Write dg [L, H], the sums from each key on of what queries [H, M] add to its gradient and keys [H, L] take."""
    first_query, first_key, queries, keys = _find_document(documents_ptr, T, S)
    h = tl.program_id(1).to(tl.int64)
    behind = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    steps = tl.cdiv(keys, BLOCK)
    for step in range(steps):
        s = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        t = s - (keys - queries)
        gained = tl.load(of_queries_ptr + h * num_queries + first_query + t, mask=(t >= 0) & (s < keys), other=0.0)
        lost = tl.load(of_keys_ptr + h * num_keys + first_key + s, mask=s < keys, other=0.0)
        change = gained.to(tl.float64) - lost.to(tl.float64)
        at = (first_key + s) * H + h
        g = tl.load(g_ptr + at, mask=s < keys, other=0.0).to(tl.float32)
        dg = tl.where(g < _LOWEST, 0.0, behind + tl.cumsum(change, 0, reverse=True))
        tl.store(dg_ptr + at, dg.to(tl.float32).to(dg_ptr.dtype.element_ty), mask=s < keys)
        behind += tl.sum(change, 0)


def _documents(batch: int, keys: int, borders: CuSeqlens | None, device: torch.device) -> tuple[Tensor | None, int]:
    """The table of documents, None where they are the rows, and their number."""
    if borders is None:
        return None, batch
    table, _ = document_tiles(batch, keys, borders, device, TOKENS_PER_STEP)
    return table, len(table)


def sum_gates(g_BSH: Tensor, queries: int, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """Sum the gates of every document, in units of log2.

    Args:
        g_BSH: logarithms of the gates.
        queries: T.
        borders: of packed documents; None where each row is one.

    Returns:
        The high and the low part of the sums, fp32 [H, L] each.
    """
    batch, keys, heads = g_BSH.shape
    documents, number = _documents(batch, keys, borders, g_BSH.device)
    high_HL, low_HL = (torch.empty(heads, batch * keys, dtype=torch.float32, device=g_BSH.device) for _ in range(2))
    sum_gates_kernel[number, heads](
        g_ptr=g_BSH, documents_ptr=documents, high_ptr=high_HL, low_ptr=low_HL, T=queries, S=keys,
        num_keys=batch * keys, H=heads, BLOCK=TOKENS_PER_STEP, num_warps=4)
    return high_HL, low_HL


def gate_gradients(g_BSH: Tensor, of_queries_HM: Tensor, of_keys_HL: Tensor, borders: CuSeqlens | None) -> Tensor:
    """Find the gradient of the gates.

    Args:
        g_BSH: logarithms of the gates.
        of_queries_HM: sums of the scores' gradients over the keys of each query.
        of_keys_HL: the same over the queries of each key.
        borders: as in `sum_gates`.

    Returns:
        dg [B, S, H] in the dtype of g.
    """
    batch, keys, heads = g_BSH.shape
    documents, number = _documents(batch, keys, borders, g_BSH.device)
    dg_BSH = torch.empty_like(g_BSH)
    gate_gradients_kernel[number, heads](
        g_ptr=g_BSH, documents_ptr=documents, of_queries_ptr=of_queries_HM, of_keys_ptr=of_keys_HL, dg_ptr=dg_BSH,
        T=of_queries_HM.shape[1] // batch, S=keys, num_queries=of_queries_HM.shape[1], num_keys=batch * keys, H=heads,
        BLOCK=TOKENS_PER_STEP, num_warps=4)
    return dg_BSH


def _compile_cases() -> list[CompileCase]:
    types = dict.fromkeys(("T", "S", "num_queries", "num_keys", "H"), "i32") | {"documents_ptr": "*i64"}
    types |= {f"{name}_ptr": "*fp32" for name in ("g", "high", "low", "of_queries", "of_keys", "dg")}
    sizes = {"BLOCK": TOKENS_PER_STEP}
    found = []
    for label, constants in (("packed", sizes), ("rows", sizes | {"documents_ptr": None})):
        given = {name: kind for name, kind in types.items() if name not in constants}
        found += [CompileCase(f"sums of gates, {label}", sum_gates_kernel, given, constants),
                  CompileCase(f"gradients of gates, {label}", gate_gradients_kernel, given, constants)]
    return found


COMPILE_CASES = _compile_cases()
