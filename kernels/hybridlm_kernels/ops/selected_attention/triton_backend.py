"""Attention over listed blocks and a window as Triton kernels, forward and backward, by blocks with gathered queries.

A program takes a tile: some of the queries that list a block, gathered, and the keys of that block, which are read once
per tile, not once per query. It writes the attention of each query to that block alone, and a second kernel joins those
of a query with its sink. The window is two listed blocks of every query. Backward, tiles give a part of dq for each
query and block, which are added up; dk and dv of a block are sums over its tiles, in segments that are added up in
their order (`triton_gradients`). Every sum has a fixed order and there are no atomics.

M queries of all rows, B rows of T queries and S keys, H query heads, G key/value heads, U lists per query, N entries
per list, K key dim, V value dim, W parts per query and head in work buffers, R rows of a tile: the query heads of a
pair of a query and a block, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.selected_attention.triton_forward import Options, Sets, attend
from hybridlm_kernels.ops.selected_attention.triton_gradients import gradients
from hybridlm_kernels.ops.sparse_attention.triton_backend import LOG2_E
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward


def selected_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTUN: Tensor, scale: float,
                       block: int | None, window: int | None, window_k_BWGK: Tensor | None,
                       window_v_BWGV: Tensor | None, sinks_H: Tensor | None, bias_BTUN: Tensor | None,
                       cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked."""
    tensors = [q_BTHK, k_BSGK, v_BSGV, window_k_BWGK, window_v_BWGV]
    dtype = q_BTHK.dtype
    for x in tensors:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    q, k, v, window_k, window_v = (None if x is None else x.to(dtype).contiguous() for x in tensors)
    sinks, bias = (None if x is None else x.float().contiguous() for x in (sinks_H, bias_BTUN))
    o, lse = _TritonSelectedAttention.apply(q, k, v, window_k, window_v, sinks, bias, indices_BTUN,
                                            Options(scale, block, window, cu_seqlens))
    return o.to(v_BSGV.dtype), lse


class _TritonSelectedAttention(torch.autograd.Function):
    """Keeps inputs, outputs and the log sums; the backward computes the probabilities again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window_k: Tensor | None, window_v: Tensor | None,
                sinks: Tensor | None, bias: Tensor | None, indices: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        o, lse = attend(Sets(q, k, v, window_k, window_v, sinks, bias, indices, options))
        ctx.save_for_backward(q, k, v, window_k, window_v, sinks, bias, indices, o, lse)
        ctx.options = options
        return o, lse / LOG2_E

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, window_k, window_v, sinks, bias, indices, o, lse = ctx.saved_tensors
        sets = Sets(q, k, v, window_k, window_v, sinks, bias, indices, ctx.options)
        found = gradients(sets, do.contiguous(), dlse.contiguous(), o, lse, ctx.needs_input_grad[6])
        return *found, None, None
