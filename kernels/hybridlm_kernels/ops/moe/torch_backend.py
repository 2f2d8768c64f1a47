"""Routed SwiGLU experts by grouped matrix products over the tokens sorted by expert.

N tokens, A experts per token, E experts, D model width, I expert width, P rows of the sorted buffer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.swiglu.soft_caps import SoftCaps
from hybridlm_kernels.ops.swiglu.torch_backend import bounded, soft_parts
from hybridlm_kernels.precision import plain_backward, product_dtype
from hybridlm_kernels.registry import Call


def supports(call: Call) -> tuple[bool, str]:
    """Accepts 32 and 16 bit floats, for which torch has grouped matrix products."""
    ok = call.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return ok, "" if ok else f"grouped matrix products know no {call.dtype}"


def moe_experts(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor,
                weights_NA: Tensor, limit: float | None = None, soft_caps: SoftCaps | None = None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    dtype = product_dtype(x_ND)  # grouped_mm is not on autocast's list
    x_ND, gate_up_E2ID, down_EDI = x_ND.to(dtype), gate_up_E2ID.to(dtype), down_EDI.to(dtype)
    dim = x_ND.shape[1]
    gate_up_E2ID, down_EDI = _pad_widths(gate_up_E2ID, down_EDI)
    x_ND = F.pad(x_ND, (0, gate_up_E2ID.shape[2] - dim)) if gate_up_E2ID.shape[2] != dim else x_ND
    slot_NA, token_P, offs_E = _sort_by_expert(expert_ids_NA, gate_up_E2ID.shape[0])
    y_ND = _TorchExperts.apply(x_ND, gate_up_E2ID, down_EDI, weights_NA, slot_NA, token_P, offs_E, limit,
                               soft_caps)
    return y_ND if y_ND.shape[1] == dim else y_ND[:, :dim]


def _pad_widths(gate_up_E2ID: Tensor, down_EDI: Tensor) -> tuple[Tensor, Tensor]:
    """D and I rounded up with zeros to the 16 bytes that grouped_mm asks of a row; zeros change no result."""
    dim, width = down_EDI.shape[1:]
    step = 16 // down_EDI.element_size()
    extra_d, extra_i = -dim % step, -width % step
    if extra_d or extra_i:
        gate_up_E2ID = torch.cat([F.pad(half, (0, extra_d, 0, extra_i)) for half in gate_up_E2ID.chunk(2, 1)], 1)
        down_EDI = F.pad(down_EDI, (0, extra_i, 0, extra_d))
    return gate_up_E2ID, down_EDI


def _sort_by_expert(expert_ids_NA: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the (token, expert) pairs by expert; on a GPU the host does not wait for the device.

    Returns slot_NA (row of the pair), token_P (token of each row) and int32 offs_E (end of each expert's rows).
    """
    ids_M = expert_ids_NA.flatten()
    pairs, device = ids_M.numel(), ids_M.device
    sorted_M, order_M = ids_M.sort(stable=True)
    counts_E = torch.bincount(ids_M, minlength=experts) if device.type == "cpu" else _counts(ids_M, experts)
    row_M = torch.arange(pairs, device=device)
    rows = pairs
    # A CPU matrix product sums in another order when it has fewer than about two rows per thread. Groups padded
    # above that make a token's result the same, to the bit, whatever tokens share its expert.
    min_rows = max(16, 2 * torch.get_num_threads())
    if device.type == "cpu" and bool(((counts_E > 0) & (counts_E < min_rows)).any()):
        padded_E = counts_E.clamp(min=min_rows) * (counts_E > 0)
        row_M = row_M + ((padded_E - counts_E).cumsum(0) - (padded_E - counts_E))[sorted_M]
        counts_E, rows = padded_E, int(padded_E.sum())
    slot_M = torch.empty_like(row_M).index_copy_(0, order_M, row_M)
    token_P = order_M.div(expert_ids_NA.shape[1], rounding_mode="floor")
    if rows != pairs:
        token_P = token_P.new_zeros(rows).index_copy_(0, row_M, token_P)
    return slot_M.view_as(expert_ids_NA), token_P, counts_E.cumsum(0).to(torch.int32)


def _counts(ids_M: Tensor, experts: int) -> Tensor:
    """Number of rows per expert; bincount would wait for the device to learn the size of its result."""
    return torch.zeros(experts, dtype=torch.int64, device=ids_M.device).scatter_add_(
        0, ids_M.long(), torch.ones_like(ids_M, dtype=torch.int64))


def _gather_sum(rows_PD: Tensor, slot_NA: Tensor) -> Tensor:
    """Sums rows[slot_na] over a, in the order of a: no atomics, so the same bits every time."""
    if slot_NA.numel() == 0:
        return rows_PD.new_zeros(slot_NA.shape[0], rows_PD.shape[1])
    return F.embedding_bag(slot_NA, rows_PD, mode="sum")


class _TorchExperts(torch.autograd.Function):
    """Keeps the input and the gate and up projections; everything else is computed again in the backward.

    The combining weight multiplies the I-wide activation, before `down`: narrower than its output, and its
    gradient needs no copy of that output.
    """

    @staticmethod
    def forward(ctx, x_ND, gate_up_E2ID, down_EDI, weights_NA, slot_NA, token_P, offs_E, limit, soft_caps):
        x_PD = x_ND.index_select(0, token_P)
        h_P2I = F.grouped_mm(x_PD, gate_up_E2ID.transpose(1, 2), offs=offs_E)
        weight_P1 = _weight_per_row(weights_NA, slot_NA, len(token_P))
        if soft_caps is None:
            gate_PI, up_PI = _bounded_gate_up(h_P2I, limit)
            act_PI = F.silu(gate_PI).mul_(up_PI).mul_(weight_P1)
        else:
            gate_PI, up_PI = h_P2I.chunk(2, -1)
            f_PI, u_PI, _, _ = soft_parts(gate_PI, up_PI, soft_caps)
            act_PI = f_PI.mul_(u_PI).to(h_P2I.dtype).mul_(weight_P1)
        y_PD = F.grouped_mm(act_PI, down_EDI.transpose(1, 2), offs=offs_E)
        ctx.save_for_backward(x_ND, gate_up_E2ID, down_EDI, weights_NA, slot_NA, token_P, offs_E, h_P2I)
        ctx.limit, ctx.soft_caps = limit, soft_caps
        return _gather_sum(y_PD, slot_NA)

    @staticmethod
    @plain_backward
    def backward(ctx, dy_ND):
        x_ND, gate_up_E2ID, down_EDI, weights_NA, slot_NA, token_P, offs_E, h_P2I = ctx.saved_tensors
        if ctx.soft_caps is None:
            gate_PI, up_PI = _bounded_gate_up(h_P2I, ctx.limit)
            silu_PI = F.silu(gate_PI)
        else:  # silu_PI and up_PI are the two factors, whose derivatives follow
            gate_PI, up_PI = h_P2I.chunk(2, -1)
            silu_PI, up_PI, *derivatives = (x.to(h_P2I.dtype) for x in soft_parts(gate_PI, up_PI, ctx.soft_caps))
        weight_P1 = _weight_per_row(weights_NA, slot_NA, len(token_P))
        dy_PD = dy_ND.index_select(0, token_P)
        # of the weighted activation; the weight of a padding row is 0, which keeps it out of all that follows
        dact_PI = F.grouped_mm(dy_PD, down_EDI, offs=offs_E)
        act_PI = silu_PI * up_PI
        dh_P2I = torch.empty_like(h_P2I)
        dgate_PI, dup_PI = dh_P2I.chunk(2, -1)
        dweights_NA = ddown_EDI = dgate_up_E2ID = dx_ND = None
        if ctx.needs_input_grad[3]:  # dgate_PI lends its memory
            dweight_P = torch.mul(dact_PI, act_PI, out=dgate_PI).sum(-1, dtype=torch.float32)
            dweights_NA = dweight_P[slot_NA].to(weights_NA.dtype)
        if ctx.needs_input_grad[2]:
            ddown_EDI = F.grouped_mm(dy_PD.T, act_PI.mul_(weight_P1), offs=offs_E)
        torch.mul(dact_PI.mul_(weight_P1), silu_PI, out=dup_PI)
        if ctx.soft_caps is None:
            torch.ops.aten.silu_backward(dact_PI.mul_(up_PI), gate_PI, grad_input=dgate_PI)
        else:
            torch.mul(dact_PI.mul_(up_PI), derivatives[0], out=dgate_PI)
            dup_PI.mul_(derivatives[1])
        if ctx.limit is not None:
            raw_gate_PI, raw_up_PI = h_P2I.chunk(2, -1)
            dgate_PI.mul_(raw_gate_PI <= ctx.limit)
            dup_PI.mul_(raw_up_PI.abs() <= ctx.limit)
        if ctx.needs_input_grad[1]:
            dgate_up_E2ID = F.grouped_mm(dh_P2I.T, x_ND.index_select(0, token_P), offs=offs_E)
        if ctx.needs_input_grad[0]:
            dx_ND = _gather_sum(F.grouped_mm(dh_P2I, gate_up_E2ID, offs=offs_E), slot_NA)
        return dx_ND, dgate_up_E2ID, ddown_EDI, dweights_NA, None, None, None, None, None


def _bounded_gate_up(h_P2I: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """Gate and up of every row, clamped where there is a limit."""
    gate_PI, up_PI = h_P2I.chunk(2, -1)
    return bounded(gate_PI, up_PI, limit)


def _weight_per_row(weights_NA: Tensor, slot_NA: Tensor, rows: int) -> Tensor:
    """Combining weight of each row [P, 1], 0 for padding rows."""
    weight_P = weights_NA.new_zeros(rows) if rows != slot_NA.numel() else weights_NA.new_empty(rows)
    return weight_P.index_copy_(0, slot_NA.flatten(), weights_NA.flatten())[:, None]
