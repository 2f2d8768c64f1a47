"""Linear attention with a decay per value channel by chunks, in torch operations, with its own backward pass.

Inside a chunk that starts from state S, with scores A = tril(Q K^T), products of decays p from the start of the chunk
and s to its end:
    outputs      O = p * (Q S) + sum_j A_ij (a_{j+1} ... a_i) * v_j
    next state   S' = S Diag(total) + K^T (s * V)
The sum over pairs is built by doubling: the decay between the halves of a block is a prefix of the second half times a
suffix of the first, so each doubling is one matrix product of undecayed scores, and no [C, C, V] tensor is formed.
(Zhang et al. 2024, Gated Slot Attention, section 3.3.)

Legend: B rows, T tokens, H heads, K/V key/value head dim, N documents, P chunks of a group of steps, C tokens per
chunk, X = P H chunk-heads, b tokens per half block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.value_decay_attention import reference
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import math_dtype
from hybridlm_kernels.recurrence.chunk_layout import StepGroup, chunk_size, get_chunk_layout
from hybridlm_kernels.recurrence.decay_products import (
    corner_blocks,
    doublings,
    drop_negligible,
    extend_products,
    sum_from_and_before,
)

RECURRENT_MAX_TOKENS = 8  # up to so many tokens the recurrence itself is faster than chunks
SAVED_PER_GROUP = 6


def value_decay_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHV: Tensor, scale: float,
                          state_NHKV: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    if borders is None and q_BTHK.shape[1] <= RECURRENT_MAX_TOKENS:
        return reference.value_decay_attention(q_BTHK, k_BTHK, v_BTHV, g_BTHV, scale, state_NHKV, None)
    return _TorchValueDecayAttention.apply(q_BTHK, k_BTHK, v_BTHV, g_BTHV, state_NHKV, scale, borders)


class _TorchValueDecayAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float,
                borders: CuSeqlens | None) -> Any:
        (B, T, H, K), V = k.shape, v.shape[3]
        dtype = math_dtype(v)
        layout = get_chunk_layout(B, T, chunk_size(T, borders, q.device), borders, q.device)
        states = layout.copy_states(state, (H, K, V), dtype)
        buffer = layout.allocate_output((B, T, H, V), v.dtype)
        kept: list[Tensor] = []
        for group in layout.step_groups(H * max(K, V)):
            live = slice(0, group.live)
            o, states[live], saved = _forward(group, q, k, v, g, states[live], scale)
            group.scatter(o, buffer)
            if any(ctx.needs_input_grad):
                kept += saved
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.dtype, ctx.state_shape = layout, scale, dtype, (H, K, V)
        ctx.inputs = [(x.shape, x.dtype) for x in (q, k, v, g)]
        ctx.state_dtype = None if state is None else state.dtype
        return layout.finish_output(buffer, v.shape), layout.unsort_documents(states)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_final: Tensor) -> Any:
        layout, (H, K, V) = ctx.layout, ctx.state_shape
        step_groups = layout.step_groups(H * max(K, V))
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        d_states = layout.copy_states(d_final, (H, K, V), ctx.dtype)
        buffers = [layout.allocate_output(*spec) for spec in ctx.inputs]
        for i, group in reversed(list(enumerate(step_groups))):
            live = slice(0, group.live)
            of_group = saved[i * SAVED_PER_GROUP : (i + 1) * SAVED_PER_GROUP]
            grads, d_states[live] = _backward(group, of_group, ctx.scale, group.gather(do, ctx.dtype), d_states[live])
            for buffer, grad in zip(buffers, grads, strict=True):
                group.scatter(grad.unflatten(0, (-1, H)), buffer)
        d_inputs = [layout.finish_output(buffer, spec[0]) for buffer, spec in zip(buffers, ctx.inputs, strict=True)]
        d_state = None if ctx.state_dtype is None else layout.unsort_documents(d_states).to(ctx.state_dtype)
        return *d_inputs, d_state, None, None


def _forward(group: StepGroup, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor,
             scale: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs [P, H, C, V] of one group, the states after it, and the tensors its backward pass needs."""
    dtype = state.dtype
    _, H, K, V = state.shape
    q, k, v, g = (group.gather(x, dtype).flatten(0, 1) for x in (q, k, v, g))
    q, a = q.mul_(scale), drop_negligible(g.exp_())
    A = torch.bmm(q, k.mT)
    o = A.diagonal(dim1=-2, dim2=-1)[..., None] * v
    prefix, suffix = a.clone(), torch.ones_like(a)
    for b in doublings(A.shape[1]):
        p, s = prefix.view(-1, 2, b, V), suffix.view(-1, 2, b, V)
        columns = v.view(-1, 2, b, V)[:, 0] * s[:, 0]
        o.view(-1, 2, b, V)[:, 1].addcmul_(corner_blocks(A, b).flatten(0, 1) @ columns, p[:, 1])
        extend_products(p, s)
    slots = group.slots
    states = state.new_empty(slots.size, H, K, V)
    states[: slots.live] = state
    per_step = [slots.slice_steps(x, H) for x in (torch.bmm(k.mT, v * suffix), prefix[:, -1:])]
    for (S, S_next), written, total in zip(slots.steps(states), *per_step, strict=True):
        torch.addcmul(written, S, total, out=S_next)
    S = slots.before_chunks(states).view(-1, K, V)
    o.addcmul_(torch.bmm(q, S), prefix)
    return o.unflatten(0, (-1, H)), slots.last(states), [q, k, v, a, A, S]


def _backward(group: StepGroup, saved: tuple[Tensor, ...], scale: float, do: Tensor,
              d_last: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradients of the chunked q, k, v and g [X, C, ...], and of the states before the group."""
    q, k, v, a, A, S = saved
    H, (K, V), do = do.shape[1], S.shape[1:], do.flatten(0, 1)
    prefix, suffix = a.clone(), torch.ones_like(a)
    dA = torch.zeros_like(A)
    rows, columns = torch.zeros_like(v), torch.zeros_like(v)  # rows: what other tokens give to o; columns: to dv
    for b in doublings(A.shape[1]):
        p, s = prefix.view(-1, 2, b, V), suffix.view(-1, 2, b, V)
        corner, below = corner_blocks(A, b), corner_blocks(dA, b)
        first, second = v.view(-1, 2, b, V)[:, 0] * s[:, 0], do.view(-1, 2, b, V)[:, 1] * p[:, 1]
        scores = corner.flatten(0, 1)
        below.copy_((second @ first.mT).view_as(below))
        rows.view(-1, 2, b, V)[:, 1].addcmul_(scores @ first, p[:, 1])
        columns.view(-1, 2, b, V)[:, 0].addcmul_(scores.mT @ second, s[:, 0])
        extend_products(p, s)
    rows.addcmul_(torch.bmm(q, S), prefix)
    dA.diagonal(dim1=-2, dim2=-1).copy_((do * v).sum(-1))
    d_reads = do * prefix
    slots = group.slots
    d_states = d_last.new_empty(slots.size, H, K, V)
    slots.put_last(d_states, d_last)
    slots.put_before_chunks(d_states, torch.bmm(q.mT, d_reads).view(-1, H, K, V))
    steps = zip(slots.steps(d_states), slots.slice_steps(prefix[:, -1:], H), strict=True)
    for (dS, dS_next), total in reversed(list(steps)):
        dS.addcmul_(dS_next, total)
    dS_after = slots.after_chunks(d_states).view(-1, K, V)
    d_first = d_states[: slots.live].clone()
    dq = torch.bmm(d_reads, S.mT).baddbmm_(dA, k).mul_(scale)
    dk = torch.bmm(v * suffix, dS_after.mT).baddbmm_(dA.mT, q)
    written = torch.bmm(k, dS_after).mul_(suffix)  # gradient of the values as they arrive in the next state
    dg = sum_from_and_before((do * rows).addcmul_(v, columns, value=-1), v * written)
    dg += (dS_after * S).sum(1, keepdim=True) * prefix[:, -1:]
    dv = columns.add_(written).addcmul_(A.diagonal(dim1=-2, dim2=-1)[..., None], do)
    return [dq, dk, dv, dg], d_first
