"""Routed SwiGLU experts as Triton kernels: see README.md for the five products and what each is fused with.

N tokens, A experts per token, E experts, D model width, I expert width, P = N A rows in the order by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.moe import triton_products as products
from hybridlm_kernels.ops.moe.triton_routing import gather_sum, sort_by_expert
from hybridlm_kernels.precision import plain_backward, product_dtype


def moe_experts(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor,
                weights_NA: Tensor, limit: float | None = None, soft_caps: None = None) -> Tensor:
    """The Triton backend; arguments as in the public function, already checked."""
    dtype = product_dtype(x_ND)
    inputs = (x_ND.to(dtype), gate_up_E2ID.to(dtype), down_EDI.to(dtype), weights_NA)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _TritonExperts.apply(*inputs, sort_by_expert(expert_ids_NA, len(down_EDI)), limit, keep)


class _TritonExperts(torch.autograd.Function):
    """Keeps the input and the gate and up projections; everything else is computed again in the backward."""

    @staticmethod
    def forward(ctx, x_ND, gate_up_E2ID, down_EDI, weights_NA, routes, limit, keep):
        x_ND, gate_up_E2ID, down_EDI, weights_NA = (
            t.contiguous() for t in (x_ND, gate_up_E2ID, down_EDI, weights_NA))
        h_P2I, act_PI = products.gate_up(x_ND, gate_up_E2ID, weights_NA, routes, limit, keep)
        ctx.save_for_backward(x_ND, gate_up_E2ID, down_EDI, weights_NA, h_P2I)
        ctx.routes, ctx.limit = routes, limit
        return gather_sum(products.rows(act_PI, down_EDI, routes), routes.slot_NA)

    @staticmethod
    @plain_backward
    def backward(ctx, dy_ND):
        x_ND, gate_up_E2ID, down_EDI, weights_NA, h_P2I = ctx.saved_tensors
        routes, dy_ND = ctx.routes, dy_ND.contiguous()
        dh_P2I, act_PI, dweight_P = products.activation_gradient(dy_ND, down_EDI, h_P2I, weights_NA, routes, ctx.limit)
        dx_ND = dgate_up_E2ID = ddown_EDI = dweights_NA = None
        if ctx.needs_input_grad[0]:
            dx_ND = gather_sum(products.rows(dh_P2I, gate_up_E2ID, routes, transposed=True), routes.slot_NA)
        if ctx.needs_input_grad[1]:
            dgate_up_E2ID = products.weight_gradient(dh_P2I, x_ND, routes, tokens="b")
        if ctx.needs_input_grad[2]:
            ddown_EDI = products.weight_gradient(dy_ND, act_PI, routes, tokens="a")
        if ctx.needs_input_grad[3]:
            dweights_NA = dweight_P[routes.slot_NA].to(weights_NA.dtype)
        return dx_ND, dgate_up_E2ID, ddown_EDI, dweights_NA, None, None, None
