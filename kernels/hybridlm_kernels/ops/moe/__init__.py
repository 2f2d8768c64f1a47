"""Routed experts of a mixture-of-experts feed-forward. Equation and costs: README.md."""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.ops.moe import reference
from hybridlm_kernels.ops.moe import torch_backend as eager
from hybridlm_kernels.precision import product_dtype
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

MOST_EXPERTS = 1024  # that a Triton program of the tile table looks at


def _few_enough(call: Call) -> tuple[bool, str]:
    experts = call.get("experts")
    return (True, "") if experts <= MOST_EXPERTS else (False, f"sorts for up to {MOST_EXPERTS} experts; got {experts}")


MOE_EXPERTS = register(Operation("moe_experts", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.moe.triton_backend", "moe_experts", _few_enough),
    Backend("torch", eager.moe_experts, eager.supports), Backend("reference", reference.moe_experts))))


def moe_experts(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor,
                weights_NA: Tensor, *, limit: float | None = None, backend: str | None = None) -> Tensor:
    """y_n = sum over a of weights_na * down_e swiglu(gate_e x_n, up_e x_n), e = expert_ids_na. Drops nothing.

    Args:
        x_ND: [N, D] tokens.
        gate_up_E2ID: [E, 2I, D], the gate rows first.
        down_EDI: [E, D, I].
        expert_ids_NA: integers [N, A] in 0..E-1, A experts a token.
        weights_NA: [N, A] combining weights.
        limit: clamps inside SwiGLU, see `swiglu`.

    Returns:
        [N, D] in x.dtype. Differentiable in x, gate_up, down and weights.

    Raises:
        ValueError: shapes that do not fit.
    """
    experts, two_i, dim = gate_up_E2ID.shape
    if x_ND.dim() != 2 or x_ND.shape[1] != dim:
        raise ValueError(f"moe_experts: x must be [N, {dim}] to fit gate_up [E, 2I, D] = "
                         f"{list(gate_up_E2ID.shape)}; got {list(x_ND.shape)}")
    if two_i % 2 or down_EDI.shape != (experts, dim, two_i // 2):
        raise ValueError(f"moe_experts: down must be [E, D, I] = {[experts, dim, two_i // 2]}; "
                         f"got {list(down_EDI.shape)}")
    if expert_ids_NA.shape != weights_NA.shape or expert_ids_NA.dim() != 2 or len(expert_ids_NA) != len(x_ND):
        raise ValueError(f"moe_experts: expert_ids and weights must both be [{len(x_ND)}, A]; "
                         f"got {list(expert_ids_NA.shape)} and {list(weights_NA.shape)}")
    call = Call.of(x_ND, gate_up_E2ID, down_EDI, weights_NA, experts=experts, product_dtype=product_dtype(x_ND))
    chosen = choose(MOE_EXPERTS, call, backend)
    return chosen.run(x_ND, gate_up_E2ID, down_EDI, expert_ids_NA, weights_NA, limit)
