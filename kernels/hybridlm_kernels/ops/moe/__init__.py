"""Routed experts of a mixture-of-experts feed-forward. Equation and costs: README.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.index_checks import check_indices
from hybridlm_kernels.ops.moe import reference, torch_backend
from hybridlm_kernels.ops.swiglu import SoftCaps, check_bounds, no_soft_caps
from hybridlm_kernels.precision import product_dtype
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

MAX_TRITON_EXPERTS = 1024  # one program reads the whole table of experts


def _fits_triton(call: Call) -> tuple[bool, str]:
    if call.get("soft_caps"):
        return no_soft_caps(call)
    experts = call.get("experts")
    if experts > MAX_TRITON_EXPERTS:
        return False, f"sorts for up to {MAX_TRITON_EXPERTS} experts; got {experts}"
    return True, ""


MOE_EXPERTS = register(Operation("moe_experts", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.moe.triton_backend", "moe_experts", _fits_triton),
    Backend("torch", torch_backend.moe_experts, torch_backend.supports), Backend("reference", reference.moe_experts))))


def _outputs(x_ND: Tensor, *_: Any, **__: Any) -> Tensor:
    return x_ND.new_empty(x_ND.shape, dtype=product_dtype(x_ND))


@compilable(_outputs, keeps=("x_ND", "gate_up_E2ID", "down_EDI"))
def moe_experts(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor,
                weights_NA: Tensor, *, limit: float | None = None, soft_caps: SoftCaps | None = None,
                backend: str | None = None) -> Tensor:
    """Routed SwiGLU experts: every token's chosen experts, summed with the combining weights; no token is dropped.

        y_n = sum over a of weights_na * down_e swiglu(gate_e x_n, up_e x_n),  e = expert_ids_na

    Args:
        x_ND: tokens [N, D], activated: after the norm before the feed-forward.
        gate_up_E2ID: weights of gate and up [E, 2I, D], the gate rows first.
        down_EDI: weights of the way down [E, D, I].
        expert_ids_NA: integers [N, A] in 0..E-1, A experts per token.
        weights_NA: combining weights [N, A], activated: after softmax or sigmoid, normalisation and scale.
        limit: clamps inside SwiGLU, see `swiglu`.
        soft_caps: caps of SiTU in its place, see `swiglu`.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [N, D] in x's dtype (autocast's inside autocast). Differentiable in x, gate_up, down and weights.

    Raises:
        ValueError: the shapes do not fit one another, or bounds are not positive.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Shazeer et al. 2017, eq. 1; DeepSeekMoE, Dai et al. 2024, eq. 3.

    >>> import torch
    >>> x, down = torch.tensor([[1.0]]), torch.ones(2, 1, 1)
    >>> gate_up = torch.tensor([[[100.0], [1.0]], [[100.0], [2.0]]])
    >>> moe_experts(x, gate_up, down, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]))  # 0.5 * 100 + 0.25 * 200
    tensor([[100.]])
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
    check_indices("moe_experts", "expert_ids", expert_ids_NA, experts)
    check_bounds("moe_experts", limit, soft_caps)
    call = Call.of(x_ND, gate_up_E2ID, down_EDI, weights_NA, experts=experts, product_dtype=product_dtype(x_ND),
                   soft_caps=soft_caps is not None)
    chosen = choose(MOE_EXPERTS, call, backend)
    return chosen.run(x_ND, gate_up_E2ID, down_EDI, expert_ids_NA, weights_NA, limit, soft_caps)
