"""The delta rule by chunks, in torch operations, with its own backward pass.

Inside a chunk that starts from state S, with its decayed queries Q, keys K and writes C, its scores A (of queries) and
L (of keys, strictly lower), and B = diag(beta):
    corrections  Y = (I + L B)^-1 (V - K S) = U - W S,  with [U | W] = (I + L B)^-1 [V | K]   (WY form)
    outputs      O = Q S + A B Y
    next state   S' = diag(total) S + C^T B Y
Scores, U and W of all chunks of a group of steps are found at once; a scan over its chunks gives the states.
(Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, section 3; Kimi Linear 2025, section 3.)

Legend: B rows, T tokens, H key heads, HV value heads, K/V key/value head dim, N documents, P chunks of a group of
steps, C tokens per chunk, X = P HV chunk-heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.delta_rule import reference
from hybridlm_kernels.ops.delta_rule.torch_erase import L2NORM_EPSILON, delta_rule_with_erase
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
from hybridlm_kernels.recurrence.erase import Erase
from hybridlm_kernels.recurrence.gates import Gate, log_decay, write_strength
from hybridlm_kernels.recurrence.triangular_solve import block_inverses, solve, solve_transposed

RECURRENT_MAX_TOKENS = 8  # up to so many tokens the recurrence itself is faster than chunks


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, beta_BTHv: Tensor | None,
               scale: float, state_NHvKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
               gate: Gate | None = None, beta_sigmoid: float | None = None, final_state: bool = True,
               erase: Erase | None = None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    g, beta_BTHv = log_decay(g, gate), write_strength(beta_BTHv, beta_sigmoid)
    if borders is None and q_BTHK.shape[1] <= RECURRENT_MAX_TOKENS:
        return reference.delta_rule(q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, scale, state_NHvKV, None, qk_l2norm,
                                    erase=erase)
    if erase is not None:
        return delta_rule_with_erase(q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, scale, state_NHvKV, borders, qk_l2norm,
                                     erase)
    return _TorchDeltaRule.apply(q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, state_NHvKV, scale, borders, qk_l2norm)


class _TorchDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
                state: Tensor | None, scale: float, borders: CuSeqlens | None, qk_l2norm: bool) -> Any:
        (B, T, _, K), (HV, V) = k.shape, v.shape[2:]
        dtype = math_dtype(v)
        layout = get_chunk_layout(B, T, chunk_size(T, borders, q.device), borders, q.device)
        states = layout.copy_states(state, (HV, K, V), dtype)
        buffer = layout.allocate_output((B, T, HV, V), v.dtype)
        kept: list[Tensor | None] = []
        for group in layout.step_groups(HV * max(K, V)):
            live = slice(0, group.live)
            o, states[live], saved = _forward(group, q, k, v, g, beta, states[live], scale, qk_l2norm)
            group.scatter(o, buffer)
            if any(ctx.needs_input_grad):
                kept += saved
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.dtype = layout, scale, dtype
        ctx.state_shape = (HV, K, V)
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in (q, k, v, g, beta)]
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
        needed = [spec is not None and need for spec, need in zip(ctx.inputs, ctx.needs_input_grad, strict=False)]
        buffers = [layout.allocate_output(*spec) if need else None
                 for spec, need in zip(ctx.inputs, needed, strict=True)]
        for i, group in reversed(list(enumerate(step_groups))):
            live = slice(0, group.live)
            of_group = saved[i * saved_per_group : (i + 1) * saved_per_group]
            grads, d_states[live] = _backward(group, of_group, ctx.inputs[0][0][2], ctx.scale,
                                              group.gather(do, ctx.dtype), d_states[live], needed)
            for buffer, grad in zip(buffers, grads, strict=True):
                if buffer is not None:
                    group.scatter(grad, buffer)
        d_inputs = [None if buffer is None else layout.finish_output(buffer, spec[0])
                    for buffer, spec in zip(buffers, ctx.inputs, strict=True)]
        d_state = layout.unsort_documents(d_states).to(ctx.state_dtype) if ctx.needs_input_grad[5] else None
        return *d_inputs, d_state, None, None, None


def _forward(group: StepGroup, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
             state: Tensor, scale: float, qk_l2norm: bool) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Outputs [P, HV, C, V] of one group, the states after it, and the tensors its backward pass needs."""
    dtype = state.dtype
    _, HV, K, V = state.shape
    q, norm_q = _normed(group.gather(q, dtype), scale, qk_l2norm)
    k, norm_k = _normed(group.gather(k, dtype), 1.0, qk_l2norm)
    decay = make_decay(group, g, HV, dtype)
    if decay.per_channel:
        q, k = repeat_key_heads(q, HV), repeat_key_heads(k, HV)
    C = q.shape[2]
    VK = torch.empty(*q.shape[:1], HV, C, V + K, dtype=dtype, device=q.device)
    group.gather(v, dtype, VK[..., :V])
    VK = VK.flatten(0, 1)
    beta = None if beta is None else group.gather(beta[..., None], dtype).view(-1, C, 1)
    A, L = decay.scores(q, k, rows_of_k=True)
    assert L is not None
    factors = decay.factors(q, k, keys=VK[..., V:])
    inverses = block_inverses(L, beta, drop=decay.per_channel)
    Y, W = solve(L, beta, inverses, VK, (V, K), drop=decay.per_channel)
    states, last = _scan(group, factors, beta, Y, W, state)
    o = torch.bmm(factors.queries, states).baddbmm_(A, _times(Y, beta))
    saved = [q, k, norm_q, norm_k, beta, A, L, inverses, Y, W, states, *decay.tensors]
    return o.view(-1, HV, C, V), last, saved


def _scan(group: StepGroup, factors: ChunkFactors, beta: Tensor | None, Y: Tensor, W: Tensor,
          state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk [X, K, V] and after the group. Turns Y from U into U - W S."""
    slots, (_, HV, K, V) = group.slots, state.shape
    states = state.new_empty(slots.size, HV, K, V)
    states[: slots.live] = state
    per_step = [slots.slice_steps(x, HV) for x in (Y, W, _times(factors.writes, beta).mT, factors.total)]
    for (S, S_next), y, w, c, total in zip(slots.steps(states), *per_step, strict=True):
        y.baddbmm_(w, S, alpha=-1)
        torch.mul(S, total, out=S_next).baddbmm_(c, y)
    return slots.before_chunks(states).view(-1, K, V), slots.last(states)


def _backward(group: StepGroup, saved: tuple[Tensor, ...], H: int, scale: float, do: Tensor, d_last: Tensor,
              needed: list[bool]) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the chunked q, k, v, g, beta, and of the states before the group."""
    q, k, norm_q, norm_k, beta, A, L, inverses, Y, W, S, *tensors = saved
    P, HV, C, V = do.shape
    do = do.view(-1, C, V)
    decay = restore_decay(tensors)
    factors = decay.factors(q, k)
    d_written = torch.bmm(A.mT, do)  # gradient of B Y, for now through the outputs alone
    d_states, d_first = _scan_back(group, factors, d_written, torch.bmm(factors.queries.mT, do),
                                   _times(W, beta), d_last)
    d_first = d_first.clone()  # a view of the memory of d_states, which is overwritten below
    dY, d_written = solve_transposed(L, beta, inverses, d_written)
    minus_dY, written = dY.neg(), _times(Y, beta)
    d_writes = torch.bmm(written, d_states.mT)
    d_total = d_states.mul_(S).sum(-1).mul_(factors.total[..., 0])
    d = ChunkFactors(torch.bmm(do, S.mT), d_writes, d_total, torch.bmm(minus_dY, S.mT))
    dA, dL = torch.bmm(do, written.mT), torch.bmm(minus_dY, written.mT)
    grads = decay.backward(q, k, A, L, dA, dL, d, needed[3])
    d_beta = (Y * d_written).sum(-1).view(P, HV, C, 1) if needed[4] else None
    dq, dk = _d_normed(grads.q, q, norm_q, scale, H), _d_normed(grads.k, k, norm_k, 1.0, H)
    return [dq, dk, dY.view(P, HV, C, V), grads.g, d_beta], d_first


def _scan_back(group: StepGroup, factors: ChunkFactors, d_written: Tensor, d_read: Tensor, W: Tensor,
               d_last: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after every chunk [X, K, V] and before the group.

    `d_read` [X, K, V] is the gradient of a chunk's state through the chunk's outputs. Adds to `d_written` in place.
    """
    slots, (_, HV, K, V) = group.slots, d_last.shape
    d_states = d_last.new_empty(slots.size, HV, K, V)
    slots.put_last(d_states, d_last)
    slots.put_before_chunks(d_states, d_read.view(-1, HV, K, V))
    per_step = [slots.slice_steps(x, HV) for x in (d_written, W.mT, factors.writes, factors.total)]
    steps = zip(slots.steps(d_states), *per_step, strict=True)
    for (dS, dS_next), dy, w, c, total in reversed(list(steps)):
        dy.baddbmm_(c, dS_next)
        dS.addcmul_(dS_next, total).baddbmm_(w, dy, alpha=-1)
    return slots.after_chunks(d_states).view(-1, K, V), d_states[: slots.live]


def _times(x_XCD: Tensor, beta_XC1: Tensor | None) -> Tensor:
    return x_XCD if beta_XC1 is None else x_XCD * beta_XC1


def _normed(x: Tensor, scale: float, norm: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and normalize x in place: scale * x / |x| and 1 / |x|, or without `norm` scale * x and None."""
    if not norm:
        return (x if scale == 1.0 else x.mul_(scale)), None
    inverse = (x * x).sum(-1, keepdim=True).add_(L2NORM_EPSILON).rsqrt_()
    return x.mul_(inverse * scale), inverse


def _d_normed(dy: Tensor, y: Tensor, inverse: Tensor | None, scale: float, H: int) -> Tensor:
    """The gradient [P, H, C, K] of `repeat_key_heads` and `_normed`, whose result is y."""
    dy, y = sum_value_heads(dy, H), y[:, :: y.shape[1] // H]
    if inverse is None:
        return dy if scale == 1.0 else dy * scale
    along = (y * dy).sum(-1, keepdim=True).mul_(1 / scale**2 if scale else 0.0)
    return torch.addcmul(dy, y, along, value=-1).mul_(inverse * scale)
