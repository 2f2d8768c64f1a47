"""The delta rule by chunks, in torch operations, with its own backward pass.

Inside a chunk that starts from state S, with the decayed queries Q, keys K and writes C of the chunk, its scores
A (of queries) and L (of keys, strictly lower), and B = diag(beta):
    corrections  Y = (I + L B)^-1 (V - K S) = U - W S,  with [U | W] = (I + L B)^-1 [V | K]   (WY form)
    outputs      O = Q S + A B Y
    next state   S' = diag(total) S + C^T B Y
Scores, U and W of all chunks of a segment are found at once; a scan over its chunks gives the states.
(Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, section 3; Kimi Linear 2025, section 3.)

Legend: B rows, T tokens, H key heads, G value heads, K/V key/value head dim, N documents, P chunks of a segment,
C tokens a chunk, X = P G chunk-heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.delta_rule import reference
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import math_dtype
from hybridlm_kernels.recurrence.chunk_layout import Segment, chunk_size, layout_of
from hybridlm_kernels.recurrence.decay_products import Factors, decay_of, from_groups, restore_decay, to_groups
from hybridlm_kernels.recurrence.gates import Gate, log_decay, write_strength
from hybridlm_kernels.recurrence.triangular_solve import block_inverses, solve, solve_transposed

FEW_TOKENS = 8  # up to here the recurrence itself is faster than chunks
EPSILON = 1e-6  # of the l2 norm


@torch.compiler.disable
def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, g: Tensor | None, beta_BTG: Tensor | None,
               scale: float, state_NGKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
               gate: Gate | None = None, beta_sigmoid: float | None = None) -> tuple[Tensor, Tensor]:
    """Arguments as in the public function, already checked."""
    g, beta_BTG = log_decay(g, gate), write_strength(beta_BTG, beta_sigmoid)
    if borders is None and q_BTHK.shape[1] <= FEW_TOKENS:
        return reference.delta_rule(q_BTHK, k_BTHK, v_BTGV, g, beta_BTG, scale, state_NGKV, None, qk_l2norm)
    return _DeltaRule.apply(q_BTHK, k_BTHK, v_BTGV, g, beta_BTG, state_NGKV, scale, borders, qk_l2norm)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
                state: Tensor | None, scale: float, borders: CuSeqlens | None, qk_l2norm: bool) -> Any:
        (B, T, _, K), (G, V) = k.shape, v.shape[2:]
        dtype = math_dtype(v)
        layout = layout_of(B, T, chunk_size(T, borders, q.device), borders, q.device)
        states = layout.new_states(state, (G, K, V), dtype)
        room = layout.new_output((B, T, G, V), v.dtype)
        kept: list[Tensor | None] = []
        for segment in layout.segments(G * max(K, V)):
            live = slice(0, segment.live)
            o, states[live], saved = _forward(segment, q, k, v, g, beta, states[live], scale, qk_l2norm)
            segment.scatter(o, room)
            if any(ctx.needs_input_grad):
                kept += saved
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.widths, ctx.dtype, ctx.scale = layout, (G, K, V), dtype, scale
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in (q, k, v, g, beta)]
        ctx.state_dtype = None if state is None else state.dtype
        return layout.finish(room, v.shape), layout.unsort(states)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_final: Tensor) -> Any:
        layout, (G, K, V) = ctx.layout, ctx.widths
        segments = layout.segments(G * max(K, V))
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        each = len(saved) // len(segments)
        d_states = layout.new_states(d_final, (G, K, V), ctx.dtype)
        needed = [spec is not None and need for spec, need in zip(ctx.inputs, ctx.needs_input_grad, strict=False)]
        rooms = [layout.new_output(*spec) if need else None
                 for spec, need in zip(ctx.inputs, needed, strict=True)]
        for i, segment in reversed(list(enumerate(segments))):
            live = slice(0, segment.live)
            grads, d_states[live] = _backward(segment, saved[i * each : (i + 1) * each], ctx.inputs[0][0][2],
                                              ctx.scale, segment.gather(do, ctx.dtype), d_states[live], needed)
            for room, grad in zip(rooms, grads, strict=True):
                if room is not None:
                    segment.scatter(grad, room)
        d_inputs = [None if room is None else layout.finish(room, spec[0])
                    for room, spec in zip(rooms, ctx.inputs, strict=True)]
        d_state = layout.unsort(d_states).to(ctx.state_dtype) if ctx.needs_input_grad[5] else None
        return *d_inputs, d_state, None, None, None


def _forward(segment: Segment, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
             state: Tensor, scale: float, qk_l2norm: bool) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Outputs [P, G, C, V] of one segment, the states after it, and what its backward pass needs."""
    dtype = state.dtype
    _, G, K, V = state.shape
    q, norm_q = _normed(segment.gather(q, dtype), scale, qk_l2norm)
    k, norm_k = _normed(segment.gather(k, dtype), 1.0, qk_l2norm)
    decay = decay_of(segment, g, G, dtype)
    if decay.per_channel:
        q, k = to_groups(q, G), to_groups(k, G)
    C = q.shape[2]
    VK = torch.empty(*q.shape[:1], G, C, V + K, dtype=dtype, device=q.device)
    segment.gather(v, dtype, VK[..., :V])
    VK = VK.flatten(0, 1)
    beta = None if beta is None else segment.gather(beta[..., None], dtype).view(-1, C, 1)
    A, L = decay.scores(q, k, rows_of_k=True)
    assert L is not None
    factors = decay.factors(q, k, keys=VK[..., V:])
    inverses = block_inverses(L, beta)
    Y, W = solve(L, beta, inverses, VK, (V, K))
    states, last = _scan(segment, factors, beta, Y, W, state)
    o = torch.bmm(factors.queries, states).baddbmm_(A, _times(Y, beta))
    saved = [q, k, norm_q, norm_k, beta, A, L, inverses, Y, W, states, *decay.tensors]
    return o.view(-1, G, C, V), last, saved


def _scan(segment: Segment, factors: Factors, beta: Tensor | None, Y: Tensor, W: Tensor,
          state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk [X, K, V] and after the segment. Turns Y from U into U - W S."""
    scan, (_, G, K, V) = segment.scan, state.shape
    states = state.new_empty(scan.size, G, K, V)
    states[: scan.live] = state
    parts = Y, W, _times(factors.writes, beta).mT, factors.total
    for (S, S_next), y, w, c, total in zip(scan.steps(states), *(scan.split(x, G) for x in parts), strict=True):
        y.baddbmm_(w, S, alpha=-1)
        torch.mul(S, total, out=S_next).baddbmm_(c, y)
    return scan.at_start(states).view(-1, K, V), scan.last(states)


def _backward(segment: Segment, saved: tuple[Tensor, ...], H: int, scale: float, do: Tensor, d_last: Tensor,
              needed: list[bool]) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the chunked q, k, v, g, beta, and of the states before the segment."""
    q, k, norm_q, norm_k, beta, A, L, inverses, Y, W, S, *tensors = saved
    P, G, C, V = do.shape
    do = do.view(-1, C, V)
    decay = restore_decay(tensors)
    factors = decay.factors(q, k)
    d_written = torch.bmm(A.mT, do)  # of B Y, for now through the outputs alone
    d_states, d_first = _scan_back(segment, factors, d_written, torch.bmm(factors.queries.mT, do),
                                   _times(W, beta), d_last)
    d_first = d_first.clone()  # of the room that d_states is a part of
    dY, d_written = solve_transposed(L, beta, inverses, d_written)
    minus_dY, written = dY.neg(), _times(Y, beta)
    d_writes = torch.bmm(written, d_states.mT)
    d_total = d_states.mul_(S).sum(-1).mul_(factors.total[..., 0])
    d = Factors(torch.bmm(do, S.mT), d_writes, d_total, torch.bmm(minus_dY, S.mT))
    dA, dL = torch.bmm(do, written.mT), torch.bmm(minus_dY, written.mT)
    grads = decay.backward(q, k, A, L, dA, dL, d, needed[3])
    d_beta = (Y * d_written).sum(-1).view(P, G, C, 1) if needed[4] else None
    dq, dk = _d_normed(grads.q, q, norm_q, scale, H), _d_normed(grads.k, k, norm_k, 1.0, H)
    return [dq, dk, dY.view(P, G, C, V), grads.g, d_beta], d_first


def _scan_back(segment: Segment, factors: Factors, d_written: Tensor, d_read: Tensor, W: Tensor,
               d_last: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after every chunk [X, K, V] and before the segment.

    `d_read` [X, K, V] is what the outputs of a chunk give to its state. Adds to `d_written` in place.
    """
    scan, (_, G, K, V) = segment.scan, d_last.shape
    d_states = d_last.new_empty(scan.size, G, K, V)
    scan.put_last(d_states, d_last)
    scan.put_at_start(d_states, d_read.view(-1, G, K, V))
    parts = d_written, W.mT, factors.writes, factors.total
    steps = zip(scan.steps(d_states), *(scan.split(x, G) for x in parts), strict=True)
    for (dS, dS_next), dy, w, c, total in reversed(list(steps)):
        dy.baddbmm_(c, dS_next)
        dS.addcmul_(dS_next, total).baddbmm_(w, dy, alpha=-1)
    return scan.after(d_states).view(-1, K, V), d_states[: scan.live]


def _times(x_XCD: Tensor, beta_XC1: Tensor | None) -> Tensor:
    return x_XCD if beta_XC1 is None else x_XCD * beta_XC1


def _normed(x: Tensor, scale: float, norm: bool) -> tuple[Tensor, Tensor | None]:
    """scale * x / |x|, and 1 / |x|; without norm scale * x and None. Changes x."""
    if not norm:
        return (x if scale == 1.0 else x.mul_(scale)), None
    inverse = (x * x).sum(-1, keepdim=True).add_(EPSILON).rsqrt_()
    return x.mul_(inverse * scale), inverse


def _d_normed(dy: Tensor, y: Tensor, inverse: Tensor | None, scale: float, H: int) -> Tensor:
    """The gradient of `to_groups` and `_normed` (y their result): [P, H, C, K]."""
    dy, y = from_groups(dy, H), y[:, :: y.shape[1] // H]
    if inverse is None:
        return dy if scale == 1.0 else dy * scale
    along = (y * dy).sum(-1, keepdim=True).mul_(1 / scale**2 if scale else 0.0)
    return torch.addcmul(dy, y, along, value=-1).mul_(inverse * scale)
