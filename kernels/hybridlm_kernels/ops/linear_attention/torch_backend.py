"""Linear attention with decay by chunks, in torch operations, with its own backward pass.

Inside a chunk that starts from state S, with its decayed queries Q, writes C and scores A:
    outputs      O = Q S + A V
    next state   S' = diag(total) S + C^T V
(Sun et al. 2023, RetNet, section 2.3; Yang et al. 2023, Gated Linear Attention, section 3.)

Legend: B rows, T tokens, H key heads, HV value heads, K/V key/value head dim, N documents, P chunks of a group of
steps, C tokens per chunk, X = P HV chunk-heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.linear_attention import reference
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import math_dtype
from hybridlm_kernels.recurrence.chunk_layout import StepGroup, chunk_size, get_chunk_layout
from hybridlm_kernels.recurrence.decay_products import (
    ChunkFactors,
    make_decay,
    repeat_key_heads,
    restore_decay,
    sum_value_heads,
)
from hybridlm_kernels.recurrence.gates import Gate, log_decay

RECURRENT_MAX_TOKENS = 8  # up to so many tokens the recurrence itself is faster than chunks


def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, scale: float,
                    state_NHvKV: Tensor | None, borders: CuSeqlens | None,
                    gate: Gate | None = None, final_state: bool = True) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    g = log_decay(g, gate)
    if borders is None and q_BTHK.shape[1] <= RECURRENT_MAX_TOKENS:
        return reference.linear_attention(q_BTHK, k_BTHK, v_BTHvV, g, scale, state_NHvKV, None)
    return _TorchLinearAttention.apply(q_BTHK, k_BTHK, v_BTHvV, g, state_NHvKV, scale, borders)


class _TorchLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, scale: float,
                borders: CuSeqlens | None) -> Any:
        (B, T, _, K), (HV, V) = k.shape, v.shape[2:]
        dtype = math_dtype(v)
        layout = get_chunk_layout(B, T, chunk_size(T, borders, q.device), borders, q.device)
        states = layout.copy_states(state, (HV, K, V), dtype)
        buffer = layout.allocate_output((B, T, HV, V), v.dtype)
        kept: list[Tensor] = []
        for group in layout.step_groups(HV * max(K, V)):
            live = slice(0, group.live)
            o, states[live], saved = _forward(group, q, k, v, g, states[live], scale)
            group.scatter(o, buffer)
            if any(ctx.needs_input_grad):
                kept += saved
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.dtype = layout, scale, dtype
        ctx.state_shape = (HV, K, V)
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in (q, k, v, g)]
        ctx.state_dtype = None if state is None else state.dtype
        return layout.finish_output(buffer, v.shape), layout.unsort_documents(states)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_final: Tensor) -> Any:
        layout, (HV, K, V) = ctx.layout, ctx.state_shape
        step_groups = layout.step_groups(HV * max(K, V))
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        saved_per_group = len(saved) // len(step_groups)
        d_states = layout.copy_states(d_final, (HV, K, V), ctx.dtype)
        need_g = ctx.inputs[3] is not None and ctx.needs_input_grad[3]
        constant = need_g and len(ctx.inputs[3][0]) == 1
        specs = ctx.inputs if need_g and not constant else ctx.inputs[:3]
        buffers = [layout.allocate_output(*spec) for spec in specs]
        d_constant = d_states.new_zeros(HV)
        for i, group in reversed(list(enumerate(step_groups))):
            live = slice(0, group.live)
            of_group = saved[i * saved_per_group : (i + 1) * saved_per_group]
            grads, d_states[live] = _backward(group, of_group, ctx.inputs[0][0][2], ctx.scale,
                                              group.gather(do, ctx.dtype), d_states[live], need_g)
            for buffer, grad in zip(buffers, grads, strict=False):
                group.scatter(grad, buffer)
            if constant:
                d_constant += group.sum_tokens(grads[3])
        d_inputs = [layout.finish_output(buffer, spec[0]) for buffer, spec in zip(buffers, specs, strict=True)]
        if len(d_inputs) == 3:
            d_inputs.append(d_constant.to(ctx.inputs[3][1]) if constant else None)
        d_state = None if ctx.state_dtype is None else layout.unsort_documents(d_states).to(ctx.state_dtype)
        return *d_inputs, d_state, None, None


def _forward(group: StepGroup, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
             scale: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs [P, HV, C, V] of one group, the states after it, and the tensors its backward pass needs."""
    dtype = state.dtype
    _, HV, K, V = state.shape
    q, k = group.gather(q, dtype).mul_(scale), group.gather(k, dtype)
    decay = make_decay(group, g, HV, dtype)
    if decay.per_channel:
        q, k = repeat_key_heads(q, HV), repeat_key_heads(k, HV)
    v = group.gather(v, dtype).flatten(0, 1)
    A, _ = decay.scores(q, k, rows_of_k=False)
    factors = decay.factors(q, k)
    slots = group.slots
    states = state.new_empty(slots.size, HV, K, V)
    states[: slots.live] = state
    per_step = [slots.slice_steps(x, HV) for x in (torch.bmm(factors.writes.mT, v), factors.total)]
    for (S, S_next), w, total in zip(slots.steps(states), *per_step, strict=True):
        torch.addcmul(w, S, total, out=S_next)
    S = slots.before_chunks(states).view(-1, K, V)
    o = torch.bmm(factors.queries, S).baddbmm_(A, v)
    return o.view(-1, HV, *o.shape[1:]), slots.last(states), [q, k, v, A, S, *decay.tensors]


def _backward(group: StepGroup, saved: tuple[Tensor, ...], H: int, scale: float, do: Tensor, d_last: Tensor,
              need_g: bool) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the chunked q, k, v, g, and of the states before the group."""
    q, k, v, A, S, *tensors = saved
    P, HV, C, V = do.shape
    K = q.shape[3]
    do = do.view(-1, C, V)
    decay = restore_decay(tensors)
    factors = decay.factors(q, k)
    slots = group.slots
    d_states = d_last.new_empty(slots.size, HV, K, V)
    slots.put_last(d_states, d_last)
    slots.put_before_chunks(d_states, torch.bmm(factors.queries.mT, do).view(-1, HV, K, V))
    steps = zip(slots.steps(d_states), slots.slice_steps(factors.total, HV), strict=True)
    for (dS, dS_next), total in reversed(list(steps)):
        dS.addcmul_(dS_next, total)
    dS_after = slots.after_chunks(d_states).view(-1, K, V)
    dv = torch.bmm(factors.writes, dS_after).baddbmm_(A.mT, do)
    d_writes = torch.bmm(v, dS_after.mT)
    d_first = d_states[: slots.live].clone()  # a view of memory that is overwritten below
    d_total = dS_after.mul_(S).sum(-1).mul_(factors.total[..., 0]) if need_g else factors.total
    d = ChunkFactors(torch.bmm(do, S.mT), d_writes, d_total)
    grads = decay.backward(q, k, A, None, torch.bmm(do, v.mT), None, d, need_g)
    dq = sum_value_heads(grads.q, H)
    grads_PHCD = [dq if scale == 1.0 else dq * scale, sum_value_heads(grads.k, H), dv.view(P, HV, C, V), grads.g]
    return grads_PHCD, d_first
