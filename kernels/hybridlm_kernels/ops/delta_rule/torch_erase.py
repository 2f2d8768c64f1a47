"""The delta rule with an erase key and an erase vector of its own, by chunks, with its own backward pass.

Inside a chunk that starts from state S, x_t = p_t^T R_t are the reads at the erase keys. With decayed queries Q, erase
keys P, erase vectors E and write keys C, and scores A_xy between tokens of the chunk,
    reads        X  = (I - A_pb)^-1 (P S + A_pk V) = U + W S
    outputs      O  = Q S + A_qb X + A_qk V
    next state   S' = diag(total) S + E^T X + C^T V
Where b = -beta k, the corrections Y = V - X take their place: Y = (I + A_pk B)^-1 (V - P S), B = diag(beta), and
neither A_qk V nor C^T V has to be formed. A read before the decay leaves the token's own decay out of P and A_p.

Kept for the backward pass are the inputs and one state per chunk. It finds everything else of a group of chunks again,
the gradients of all states by one scan, and then those of the inputs of all chunks at once.
(Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, section 3; Peng et al. 2025, RWKV-7.)

Legend: B rows, T tokens, H key heads, HV value heads, K/V key/value head dim, N documents, P chunks of a group of
steps, C tokens per chunk, X = P HV chunk-heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import math_dtype
from hybridlm_kernels.recurrence.chunk_layout import StepGroup, chunk_size, get_chunk_layout
from hybridlm_kernels.recurrence.decay_pairs import DecayPairs
from hybridlm_kernels.recurrence.decay_products import repeat_key_heads
from hybridlm_kernels.recurrence.erase import Erase
from hybridlm_kernels.recurrence.triangular_solve import UnitTriangularSolve

L2NORM_EPSILON = 1e-6  # added to the sum of squares


def delta_rule_with_erase(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, beta_BTHv: Tensor | None,
                          scale: float, state_NHvKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
                          erase: Erase) -> tuple[Tensor, Tensor]:
    """The torch backend for any `erase`; g and beta are activated, other arguments as in the public function."""
    inputs = (q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, erase.key, erase.vector)
    return _TorchErase.apply(*inputs, state_NHvKV, borders, _Form(scale, qk_l2norm, erase.before_decay))


class _Form(NamedTuple):
    """Options that are no tensors: the factor on the queries, whether q and k are normalized, when S is read."""

    scale: float
    qk_l2norm: bool
    before_decay: bool


class _Chunks(NamedTuple):
    """Tensors that a group of chunks computes of its tokens alone, whatever its states.

    With x = U + W S: o = queries S + scores x + own, and S' = total S + erase^T x + written.
    """

    queries: Tensor  # [X, C, K]
    scores: Tensor  # [X, C, C]
    U: Tensor  # [X, C, V]
    W: Tensor  # [X, C, K]
    erase: Tensor  # [X, C, K]
    total: Tensor  # [X | 1, K | 1, 1]
    own: Tensor | None  # [X, C, V]
    written: Tensor | None  # [X, K, V]


class _TorchErase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, p: Tensor | None,
                b: Tensor | None, state: Tensor | None, borders: CuSeqlens | None, form: _Form) -> Any:
        (B, T, _, K), (HV, V) = k.shape, v.shape[2:]
        dtype, inputs = math_dtype(v), (q, k, v, g, beta, p, b)
        layout = get_chunk_layout(B, T, chunk_size(T, borders, q.device), borders, q.device)
        states = layout.copy_states(state, (HV, K, V), dtype)
        buffer = layout.allocate_output((B, T, HV, V), v.dtype)
        kept = []
        for group in layout.step_groups(HV * max(K, V)):
            live = slice(0, group.live)
            chunks = _compute_chunks([_gather(group, x, dtype) for x in inputs], HV, form)
            starts, states[live] = _scan(group, chunks, states[live])
            x = torch.baddbmm(chunks.U, chunks.W, starts)
            o = torch.bmm(chunks.queries, starts).baddbmm_(chunks.scores, x)
            group.scatter((o if chunks.own is None else o.add_(chunks.own)).view(-1, HV, o.shape[1], V), buffer)
            if any(ctx.needs_input_grad):
                kept.append(starts)
        ctx.save_for_backward(*inputs, *kept)
        ctx.layout, ctx.form, ctx.dtype, ctx.state_shape = layout, form, dtype, (HV, K, V)
        ctx.state_dtype = None if state is None else state.dtype
        return layout.finish_output(buffer, v.shape), layout.unsort_documents(states)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_final: Tensor) -> Any:
        layout, (HV, K, V) = ctx.layout, ctx.state_shape
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        inputs, kept = saved[:7], saved[7:]
        d_states = layout.copy_states(d_final, (HV, K, V), ctx.dtype)
        buffers = [layout.allocate_output(x.shape, x.dtype) if x is not None and need else None
                   for x, need in zip(inputs, ctx.needs_input_grad[:7], strict=True)]
        for group, starts in reversed(list(zip(layout.step_groups(HV * max(K, V)), kept, strict=True))):
            live = slice(0, group.live)
            tokens = [_gather(group, x, ctx.dtype) for x in inputs]
            wanted = [x for x, buffer in zip(tokens, buffers, strict=True) if x is not None and buffer is not None]
            with torch.enable_grad():
                for leaf in wanted:
                    leaf.requires_grad_()
                chunks = _compute_chunks(tokens, HV, ctx.form)
            d_chunks, d_states[live] = _backward_of_states(group, chunks, starts, group.gather(do, ctx.dtype),
                                                           d_states[live])
            pairs = [(y, dy) for y, dy in zip(chunks, d_chunks, strict=True) if y is not None and y.requires_grad]
            found, upstream = [y for y, _ in pairs], [dy for _, dy in pairs]
            grads = iter(torch.autograd.grad(found, wanted, upstream, allow_unused=True) if pairs else ())
            for x, buffer in zip(tokens, buffers, strict=True):
                if buffer is not None and x is not None:
                    grad = next(grads, None)
                    group.scatter(torch.zeros_like(x) if grad is None else grad, buffer)
        d_inputs = [None if buffer is None else layout.finish_output(buffer, x.shape)
                    for buffer, x in zip(buffers, inputs, strict=True)]
        d_state = layout.unsort_documents(d_states).to(ctx.state_dtype) if ctx.needs_input_grad[7] else None
        return *d_inputs, d_state, None, None


def _gather(group: StepGroup, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The chunks [P, heads, C, dim] of a tensor [B, T, heads] or [B, T, heads, dim]."""
    return None if x is None else group.gather(x if x.dim() == 4 else x[..., None], dtype)


def _compute_chunks(tokens: list[Tensor | None], HV: int, form: _Form) -> _Chunks:
    """Everything of a group's chunks that does not depend on their states; differentiable.

    Args:
        tokens: q, k, v, g, beta, p and b in chunks [P, heads, C, dim].
        HV: value heads.
        form: factors and options.
    """
    q, k, v = (x for x in tokens[:3] if x is not None)
    g, beta, p, b = tokens[3:]
    if form.qk_l2norm:
        q, k = (x * (x * x).sum(-1, keepdim=True).add(L2NORM_EPSILON).rsqrt() for x in (q, k))
    q = q if form.scale == 1.0 else q * form.scale
    p = k if p is None else p
    q, k, p = (repeat_key_heads(x, HV).flatten(0, 1) for x in (q, k, p))
    v = v.flatten(0, 1)
    decay = DecayPairs(None if g is None else g.flatten(0, 1), q)
    columns = [k] if b is None else [k, repeat_key_heads(b, HV).flatten(0, 1)]
    (A_qk, *A_qb), (A_pk, *A_pb) = decay.scores([q, p], columns, [False, form.before_decay])
    A_qk = A_qk + torch.diag_embed((q * k).sum(-1))
    erase_keys = p * (decay.prefix_before if form.before_decay else decay.prefix)
    writes = columns[-1] * decay.suffix
    if b is None:
        if beta is not None:
            beta = beta.flatten(0, 1)
            A_qk, A_pk, writes = A_qk * beta.mT, A_pk * beta.mT, writes * beta
        right = torch.cat([v, -erase_keys], -1)
        U, W = UnitTriangularSolve.apply(A_pk, right).split([v.shape[-1], k.shape[-1]], -1)
        return _Chunks(q * decay.prefix, A_qk, U, W, writes, decay.total, None, None)
    right = torch.cat([torch.bmm(A_pk, v), erase_keys], -1)
    U, W = UnitTriangularSolve.apply(-A_pb[0], right).split([v.shape[-1], k.shape[-1]], -1)
    scores = A_qb[0] + torch.diag_embed((q * columns[1]).sum(-1))
    written = torch.bmm((k * decay.suffix).mT, v)
    own = torch.bmm(A_qk, v)
    return _Chunks(q * decay.prefix, scores, U, W, writes, decay.total, own, written)


def _scan(group: StepGroup, chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk [X, K, V], and after the group."""
    slots, (_, HV, K, V) = group.slots, state.shape
    states = state.new_empty(slots.size, HV, K, V)
    states[: slots.live] = state
    U, W, E = (slots.slice_steps(x, HV) for x in (chunks.U, chunks.W, chunks.erase.mT))
    total = slots.slice_steps(chunks.total.expand(chunks.U.shape[0], -1, -1), HV)
    written = None if chunks.written is None else slots.slice_steps(chunks.written, HV)
    for i, (S, S_next) in enumerate(slots.steps(states)):
        torch.mul(S, total[i], out=S_next).baddbmm_(E[i], torch.baddbmm(U[i], W[i], S))
        if written is not None:
            S_next += written[i]
    return slots.before_chunks(states).reshape(-1, K, V), slots.last(states)



def _backward_of_states(group: StepGroup, chunks: _Chunks, S: Tensor, do: Tensor,
                        d_last: Tensor) -> tuple[_Chunks, Tensor]:
    """Gradients of what `_compute_chunks` gave, and of the states before the group.

    Args:
        group: the group of chunks.
        chunks: what it computed.
        S: states [X, K, V] at the start of every chunk.
        do: gradient [P, HV, C, V] of the outputs.
        d_last: gradient of the states after the group.
    """
    slots, (_, HV, K, V) = group.slots, d_last.shape
    do = do.flatten(0, 1)
    with torch.no_grad():
        d_read = torch.bmm(chunks.queries.mT, do)  # gradient of a chunk's first state, through its queries alone
        dx = torch.bmm(chunks.scores.mT, do)
        d_states = d_last.new_empty(slots.size, HV, K, V)
        slots.put_last(d_states, d_last)
        slots.put_before_chunks(d_states, d_read.view(-1, HV, K, V))
        total = chunks.total.expand(dx.shape[0], -1, -1)
        per_step = [slots.slice_steps(x, HV) for x in (dx, chunks.W.mT, chunks.erase, total)]
        for (dS, dS_next), dx_step, W, E, decay in reversed(list(zip(slots.steps(d_states), *per_step, strict=True))):
            dx_step.baddbmm_(E, dS_next)
            dS.addcmul_(dS_next, decay).baddbmm_(W, dx_step)
        d_next = slots.after_chunks(d_states).reshape(-1, K, V)
        x = torch.baddbmm(chunks.U, chunks.W, S)
        d_total = (d_next * S).sum(-1, keepdim=True)
        d_total = d_total.sum_to_size(d_total.shape[0], *chunks.total.shape[1:]).sum_to_size(chunks.total.shape)
        d_chunks = _Chunks(torch.bmm(do, S.mT), torch.bmm(do, x.mT), dx, torch.bmm(dx, S.mT), torch.bmm(x, d_next.mT),
                           d_total, do, d_next)
        return d_chunks, d_states[: slots.live].clone()
