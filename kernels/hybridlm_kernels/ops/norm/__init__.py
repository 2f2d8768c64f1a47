"""RMS norm, gated RMS norm and L2 norm over the last dim. Equations and costs: README.md."""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.ops.norm import reference
from hybridlm_kernels.ops.norm import torch_backend as eager
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

WIDEST_ROW = 8192  # that a Triton program holds in its registers


def _row_fits(call: Call) -> tuple[bool, str]:
    dim = call.get("dim")
    return (True, "") if dim <= WIDEST_ROW else (False, f"holds rows of up to {WIDEST_ROW} in registers; got {dim}")


def _triton(function: str) -> Backend:
    return triton_support.lazy_triton_backend("hybridlm_kernels.ops.norm.triton_backend", function, _row_fits)


RMS_NORM = register(Operation("rms_norm", (
    _triton("rms_norm"), Backend("torch", eager.rms_norm), Backend("reference", reference.rms_norm))))
GATED_RMS_NORM = register(Operation("gated_rms_norm", (
    _triton("gated_rms_norm"), Backend("torch", eager.gated_rms_norm),
    Backend("reference", reference.gated_rms_norm))))
L2_NORM = register(Operation("l2_norm", (
    _triton("l2_norm"), Backend("torch", eager.l2_norm), Backend("reference", reference.l2_norm))))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool = False,
             backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in fp32 inside, returned in x.dtype.

    Args:
        x: [..., D].
        weight: [D]; with `zero_centered` (Gemma, Qwen3-Next) the factor is 1 + weight.

    Raises:
        ValueError: weight is not [D].
    """
    _check_weight("rms_norm", x, weight)
    return choose(RMS_NORM, Call.of(x, weight, dim=x.shape[-1]), backend).run(x, weight, eps, zero_centered)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, activation: str = "silu",
                   backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * act(gate), in fp32 inside, returned in x.dtype.

    Args:
        x, gate: [..., D].
        weight: [D].
        activation: "silu" (Gated DeltaNet) or "sigmoid" (KDA).

    Raises:
        ValueError: shapes that differ, or an unknown activation.
    """
    _check_weight("gated_rms_norm", x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate {tuple(gate.shape)} and x {tuple(x.shape)} differ")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"gated_rms_norm: activation must be 'silu' or 'sigmoid'; got {activation!r}")
    chosen = choose(GATED_RMS_NORM, Call.of(x, gate, weight, dim=x.shape[-1]), backend)
    return chosen.run(x, gate, weight, eps, activation)


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dim of x [..., D], in fp32 inside, returned in x.dtype."""
    return choose(L2_NORM, Call.of(x, dim=x.shape[-1]), backend).run(x, eps)


def _check_weight(name: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: weight must be [{x.shape[-1]}], as x ends; got {list(weight.shape)}")
