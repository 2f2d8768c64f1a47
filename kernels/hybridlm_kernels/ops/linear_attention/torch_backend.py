"""Linear attention with decay by chunks, in torch operations, with its own backward pass.

Inside a chunk that starts from state S, with the decayed queries Q and writes C of the chunk and its scores A:
    outputs      O = Q S + A V
    next state   S' = diag(total) S + C^T V
(Sun et al. 2023, RetNet, section 2.3; Yang et al. 2023, Gated Linear Attention, section 3.)

Legend: B rows, T tokens, H key heads, G value heads, K/V key/value head dim, N documents, P chunks of a segment,
C tokens a chunk, X = P G chunk-heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.linear_attention import reference
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import math_dtype
from hybridlm_kernels.recurrence.chunk_layout import Segment, chunk_size, layout_of
from hybridlm_kernels.recurrence.decay_products import Factors, decay_of, from_groups, restore_decay, to_groups
from hybridlm_kernels.recurrence.gates import Gate, log_decay

FEW_TOKENS = 8  # up to here the recurrence itself is faster than chunks


@torch.compiler.disable
def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, g: Tensor | None, scale: float,
                    state_NGKV: Tensor | None, borders: CuSeqlens | None,
                    gate: Gate | None = None) -> tuple[Tensor, Tensor]:
    """Arguments as in the public function, already checked."""
    g = log_decay(g, gate)
    if borders is None and q_BTHK.shape[1] <= FEW_TOKENS:
        return reference.linear_attention(q_BTHK, k_BTHK, v_BTGV, g, scale, state_NGKV, None)
    return _LinearAttention.apply(q_BTHK, k_BTHK, v_BTGV, g, state_NGKV, scale, borders)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, scale: float,
                borders: CuSeqlens | None) -> Any:
        (B, T, _, K), (G, V) = k.shape, v.shape[2:]
        dtype = math_dtype(v)
        layout = layout_of(B, T, chunk_size(T, borders, q.device), borders, q.device)
        states = layout.new_states(state, (G, K, V), dtype)
        room = layout.new_output((B, T, G, V), v.dtype)
        kept: list[Tensor] = []
        for segment in layout.segments(G * max(K, V)):
            live = slice(0, segment.live)
            o, states[live], saved = _forward(segment, q, k, v, g, states[live], scale)
            segment.scatter(o, room)
            if any(ctx.needs_input_grad):
                kept += saved
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.widths, ctx.dtype, ctx.scale = layout, (G, K, V), dtype, scale
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in (q, k, v, g)]
        ctx.state_dtype = None if state is None else state.dtype
        return layout.finish(room, v.shape), layout.unsort(states)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_final: Tensor) -> Any:
        layout, (G, K, V) = ctx.layout, ctx.widths
        segments = layout.segments(G * max(K, V))
        saved = ctx.saved_tensors  # to be read once: checkpointing gives them once
        each = len(saved) // len(segments)
        d_states = layout.new_states(d_final, (G, K, V), ctx.dtype)
        need_g = ctx.inputs[3] is not None and ctx.needs_input_grad[3]
        constant = need_g and len(ctx.inputs[3][0]) == 1
        specs = ctx.inputs if need_g and not constant else ctx.inputs[:3]
        rooms = [layout.new_output(*spec) for spec in specs]
        d_constant = d_states.new_zeros(G)
        for i, segment in reversed(list(enumerate(segments))):
            live = slice(0, segment.live)
            grads, d_states[live] = _backward(segment, saved[i * each : (i + 1) * each], ctx.inputs[0][0][2],
                                              ctx.scale, segment.gather(do, ctx.dtype), d_states[live], need_g)
            for room, grad in zip(rooms, grads, strict=False):
                segment.scatter(grad, room)
            if constant:
                d_constant += segment.sum_tokens(grads[3])
        d_inputs = [layout.finish(room, spec[0]) for room, spec in zip(rooms, specs, strict=True)]
        if len(d_inputs) == 3:
            d_inputs.append(d_constant.to(ctx.inputs[3][1]) if constant else None)
        d_state = None if ctx.state_dtype is None else layout.unsort(d_states).to(ctx.state_dtype)
        return *d_inputs, d_state, None, None


def _forward(segment: Segment, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
             scale: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs [P, G, C, V] of one segment, the states after it, and what its backward pass needs."""
    dtype = state.dtype
    _, G, K, V = state.shape
    q, k = segment.gather(q, dtype).mul_(scale), segment.gather(k, dtype)
    decay = decay_of(segment, g, G, dtype)
    if decay.per_channel:
        q, k = to_groups(q, G), to_groups(k, G)
    v = segment.gather(v, dtype).flatten(0, 1)
    A, _ = decay.scores(q, k, rows_of_k=False)
    factors = decay.factors(q, k)
    scan = segment.scan
    states = state.new_empty(scan.size, G, K, V)
    states[: scan.live] = state
    parts = torch.bmm(factors.writes.mT, v), factors.total
    for (S, S_next), w, total in zip(scan.steps(states), *(scan.split(x, G) for x in parts), strict=True):
        torch.addcmul(w, S, total, out=S_next)
    S = scan.at_start(states).view(-1, K, V)
    o = torch.bmm(factors.queries, S).baddbmm_(A, v)
    return o.view(-1, G, *o.shape[1:]), scan.last(states), [q, k, v, A, S, *decay.tensors]


def _backward(segment: Segment, saved: tuple[Tensor, ...], H: int, scale: float, do: Tensor, d_last: Tensor,
              need_g: bool) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the chunked q, k, v, g, and of the states before the segment."""
    q, k, v, A, S, *tensors = saved
    P, G, C, V = do.shape
    K = q.shape[3]
    do = do.view(-1, C, V)
    decay = restore_decay(tensors)
    factors = decay.factors(q, k)
    scan = segment.scan
    d_states = d_last.new_empty(scan.size, G, K, V)
    scan.put_last(d_states, d_last)
    scan.put_at_start(d_states, torch.bmm(factors.queries.mT, do).view(-1, G, K, V))
    steps = zip(scan.steps(d_states), scan.split(factors.total, G), strict=True)
    for (dS, dS_next), total in reversed(list(steps)):
        dS.addcmul_(dS_next, total)
    dS_after = scan.after(d_states).view(-1, K, V)
    dv = torch.bmm(factors.writes, dS_after).baddbmm_(A.mT, do)
    d_writes = torch.bmm(v, dS_after.mT)
    d_first = d_states[: scan.live].clone()  # before the room is overwritten
    d_total = dS_after.mul_(S).sum(-1).mul_(factors.total[..., 0]) if need_g else factors.total
    d = Factors(torch.bmm(do, S.mT), d_writes, d_total)
    grads = decay.backward(q, k, A, None, torch.bmm(do, v.mT), None, d, need_g)
    dq = from_groups(grads.q, H)
    grads_PHCD = [dq if scale == 1.0 else dq * scale, from_groups(grads.k, H), dv.view(P, G, C, V), grads.g]
    return grads_PHCD, d_first
