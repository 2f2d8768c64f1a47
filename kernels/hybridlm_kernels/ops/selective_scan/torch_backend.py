"""Selective scan in torch operations: blocks of tokens, whose factors and inputs are found at once.

Only the states before each block are kept for the backward pass, which computes the others again.

Legend: R rows, T tokens, D channels, N states per channel, M documents, L tokens of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.ops.selective_scan import reference
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import math_dtype

BLOCK_MAX_ELEMENTS = 2**19  # elements of one block's states: several such tensors stay in a CPU's cache
BLOCK_MAX_TOKENS = 64
RECURRENT_MAX_TOKENS = 4  # up to so many tokens blocks do not pay


def selective_scan(x_RTD: Tensor, dt_RTD: Tensor, A_DN: Tensor | None, B_RTN: Tensor, C_RTN: Tensor,
                   state_MDN: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    if borders is None and x_RTD.shape[1] <= RECURRENT_MAX_TOKENS:
        return reference.selective_scan(x_RTD, dt_RTD, A_DN, B_RTN, C_RTN, state_MDN, None)
    return _TorchSelectiveScan.apply(x_RTD, dt_RTD, A_DN, B_RTN, C_RTN, state_MDN, borders)


@dataclass(frozen=True)
class _Starts:
    """Documents that begin at one column: rows and documents, int64."""

    rows: Tensor
    documents: Tensor


class _Rows:
    """The columns at which documents of a batch begin and end, and its blocks of columns."""

    def __init__(self, shape: torch.Size, states: int, borders: CuSeqlens | None, device: torch.device):
        self.rows, self.length, channels = shape
        tokens = max(1, BLOCK_MAX_ELEMENTS // (self.rows * channels * states))
        self.block = min(tokens, BLOCK_MAX_TOKENS, self.length)
        edges = range(0, self.rows * self.length + 1, self.length) if borders is None else borders.host
        self.documents = len(edges) - 1
        begins: dict[int, list[tuple[int, int]]] = defaultdict(list)
        ends: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for document, (begin, end) in enumerate(pairwise(edges)):
            if begin < end:
                begins[begin % self.length].append((begin // self.length, document))
                ends[(end - 1) % self.length].append((begin // self.length, document))
        self.begins, self.ends = ({column: _Starts(*torch.tensor(pairs, device=device).unbind(1))
                                   for column, pairs in found.items()} for found in (begins, ends))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First and last column of each block of columns, the last one excluded."""
        for begin in range(0, self.length, self.block):
            yield begin, min(begin + self.block, self.length)


def _factors_and_inputs(x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors and inputs [R, L, D, N] of the states of one block."""
    dt_RLD1, B_RL1N = dt[..., None], B[..., None, :]
    factor = (dt_RLD1 * A).exp_() if A is not None else (dt_RLD1 * -(B_RL1N**2)).add_(1.0)
    return factor, (dt * x)[..., None] * B_RL1N


def _run_block(factor: Tensor, states: Tensor, h: Tensor, start: Tensor | None, rows: _Rows, begin: int,
               before: Tensor | None = None) -> Tensor:
    """Turn the inputs of a block into its states, in place, and return the last.

    Args:
        factor: [R, L, D, N].
        states: inputs [R, L, D, N], overwritten by the states.
        h: states before the block [R, D, N].
        start: initial states of documents [M, D, N]; None is zero.
        rows: where documents begin.
        begin: first column of the block.
        before: where given, filled with the state before each token, [R, L, D, N].
    """
    for t in range(factor.shape[1]):
        at = rows.begins.get(begin + t)
        if at is not None:
            first = h.new_zeros(len(at.rows), *h.shape[1:]) if start is None else start.index_select(0, at.documents)
            h = h.index_copy(0, at.rows, first)
        if before is not None:
            before[:, t] = h
        h = states[:, t].addcmul_(factor[:, t], h)
    return h


class _TorchSelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor, start: Tensor | None,
                borders: CuSeqlens | None) -> Any:
        dtype = math_dtype(x)
        rows = _Rows(x.shape, B.shape[2], borders, x.device)
        A_DN = None if A is None else A.to(dtype)
        start_MDN = None if start is None else start.to(dtype)
        h = torch.zeros(x.shape[0], x.shape[2], B.shape[2], dtype=dtype, device=x.device)
        final = h.new_zeros(rows.documents, *h.shape[1:]) if start_MDN is None else start_MDN.clone()
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        kept = []
        for begin, end in rows.blocks():
            kept.append(h)
            x_b, dt_b, B_b, C_b = (t[:, begin:end].to(dtype) for t in (x, dt, B, C))
            factor, states = _factors_and_inputs(x_b, dt_b, A_DN, B_b)
            h = _run_block(factor, states, h, start_MDN, rows, begin).clone()
            torch.matmul(states, C_b[..., None], out=y[:, begin:end, :, None])
            for t in range(begin, end):
                if (at := rows.ends.get(t)) is not None:
                    final.index_copy_(0, at.documents, states[at.rows, t - begin])
        ctx.save_for_backward(x, dt, A, B, C, start, torch.stack(kept))
        ctx.rows = rows
        return y.to(x.dtype), final

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> Any:
        x, dt, A, B, C, start, kept = ctx.saved_tensors
        rows: _Rows = ctx.rows
        dtype = kept.dtype
        A_DN = None if A is None else A.to(dtype)
        start_MDN = None if start is None else start.to(dtype)
        dx, d_dt, dB, dC = (torch.empty(t.shape, dtype=dtype, device=t.device) for t in (x, dt, B, C))
        dA = None if A_DN is None else torch.zeros_like(A_DN)
        d_start = None if start_MDN is None else d_final.to(dtype).clone()  # documents without tokens pass it on
        carry = torch.zeros_like(kept[0])  # gradient of the state after the block
        for (begin, end), h in reversed(list(zip(rows.blocks(), kept, strict=True))):
            x_b, dt_b, B_b, C_b, dy_b = (t[:, begin:end].to(dtype) for t in (x, dt, B, C, dy))
            factor, states = _factors_and_inputs(x_b, dt_b, A_DN, B_b)
            before = torch.empty_like(states)
            _run_block(factor, states, h, start_MDN, rows, begin, before)
            dC[:, begin:end] = torch.matmul(dy_b[..., None, :], states)[..., 0, :]
            d_states = torch.mul(dy_b[..., None], C_b[..., None, :], out=states)
            for t in reversed(range(begin, end)):
                if (at := rows.ends.get(t)) is not None:
                    carry = carry.index_copy(0, at.rows, d_final.to(dtype).index_select(0, at.documents))
                d_h = d_states[:, t - begin].add_(carry)
                carry = factor[:, t - begin] * d_h
                if (at := rows.begins.get(t)) is not None:
                    if d_start is not None:
                        d_start.index_copy_(0, at.documents, carry.index_select(0, at.rows))
                    carry = carry.index_fill(0, at.rows, 0.0)
            d_factor = before.mul_(d_states)
            by_B = torch.matmul(d_states, B_b[..., None])[..., 0]  # sum over N of gradient times B
            dx[:, begin:end] = by_B * dt_b
            dB[:, begin:end] = torch.matmul((dt_b * x_b)[..., None, :], d_states)[..., 0, :]
            if A_DN is None or dA is None:
                d_dt[:, begin:end] = by_B * x_b - torch.matmul(d_factor, B_b.square()[..., None])[..., 0]
                dB[:, begin:end] -= 2.0 * B_b * torch.matmul(dt_b[..., None, :], d_factor)[..., 0, :]
            else:
                d_exponent = d_factor.mul_(factor)
                d_dt[:, begin:end] = by_B * x_b + (d_exponent * A_DN).sum(-1)
                dA += torch.einsum("rldn,rld->dn", d_exponent, dt_b)
        grads = dx, d_dt, dA, dB, dC, d_start
        return *(None if grad is None else grad.to(t.dtype)
                 for grad, t in zip(grads, (x, dt, A, B, C, start), strict=True)), None
