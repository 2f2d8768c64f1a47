"""RMS norm, gated RMS norm and L2 norm over the last dim. Equations and costs: README.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.norm import reference, torch_backend
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

MAX_TRITON_ROW = 8192  # elements of a row that a program holds in its registers


def _row_fits(call: Call) -> tuple[bool, str]:
    dim = call.get("dim")
    if dim > MAX_TRITON_ROW:
        return False, f"holds rows of up to {MAX_TRITON_ROW} in registers; got {dim}"
    return True, ""


def _triton(function: str) -> Backend:
    return triton_support.lazy_triton_backend("hybridlm_kernels.ops.norm.triton_backend", function, _row_fits)


RMS_NORM = register(Operation("rms_norm", (
    _triton("rms_norm"), Backend("torch", torch_backend.rms_norm), Backend("reference", reference.rms_norm))))
GATED_RMS_NORM = register(Operation("gated_rms_norm", (
    _triton("gated_rms_norm"), Backend("torch", torch_backend.gated_rms_norm),
    Backend("reference", reference.gated_rms_norm))))
L2_NORM = register(Operation("l2_norm", (
    _triton("l2_norm"), Backend("torch", torch_backend.l2_norm), Backend("reference", reference.l2_norm))))


def _like_input(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


@compilable(_like_input, formula=reference.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool = False,
             backend: str | None = None) -> Tensor:
    """RMS norm over the last dim: y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32.

    Args:
        x: raw input [..., D].
        weight: factor per channel [D]; with `zero_centered` it is 1 + weight.
        eps: added to the mean of squares.
        zero_centered: whether weight is stored as its difference from 1 (Gemma, Qwen3-Next).
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [..., D] in x's dtype. Differentiable in x and weight.

    Raises:
        ValueError: weight is not [D].
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, eq. 4.

    >>> import torch
    >>> rms_norm(torch.tensor([1.0, 7.0]), torch.tensor([1.0, 2.0]), 0.0)  # the root of the mean square is 5
    tensor([0.2000, 2.8000])
    """
    _check_weight("rms_norm", x, weight)
    return choose(RMS_NORM, Call.of(x, weight, dim=x.shape[-1]), backend).run(x, weight, eps, zero_centered)


@compilable(_like_input, formula=reference.gated_rms_norm)
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, activation: str = "silu",
                   backend: str | None = None) -> Tensor:
    """RMS norm times an activated gate: y = x / sqrt(mean(x^2) + eps) * weight * act(gate), computed in fp32.

    Args:
        x: raw input [..., D].
        gate: raw gate [..., D]; the activation is applied here.
        weight: factor per channel [D].
        eps: added to the mean of squares.
        activation: "silu" (Gated DeltaNet) or "sigmoid" (KDA).
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [..., D] in x's dtype. Differentiable in x, gate and weight.

    Raises:
        ValueError: the shapes differ, or the activation is unknown.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Yang et al. 2024, Gated Delta Networks, section 3.4; Kimi Linear, 2025, section 4.1.

    >>> import torch
    >>> gated_rms_norm(torch.tensor([2.0, 2.0]), torch.zeros(2), torch.ones(2), 0.0, activation="sigmoid")
    tensor([0.5000, 0.5000])
    """
    _check_weight("gated_rms_norm", x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate {tuple(gate.shape)} and x {tuple(x.shape)} differ")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"gated_rms_norm: activation must be 'silu' or 'sigmoid'; got {activation!r}")
    chosen = choose(GATED_RMS_NORM, Call.of(x, gate, weight, dim=x.shape[-1]), backend)
    return chosen.run(x, gate, weight, eps, activation)


@compilable(_like_input, formula=reference.l2_norm)
def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """L2 norm over the last dim: y = x / sqrt(sum(x^2) + eps), computed in fp32.

    Args:
        x: raw input [..., D].
        eps: added to the sum of squares.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [..., D] in x's dtype. Differentiable in x.

    Raises:
        KernelUnavailable: no backend can run the call, or the named one cannot.

    >>> import torch
    >>> l2_norm(torch.tensor([3.0, 4.0]), 0.0)
    tensor([0.6000, 0.8000])
    """
    return choose(L2_NORM, Call.of(x, dim=x.shape[-1]), backend).run(x, eps)


def _check_weight(name: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: weight must be [{x.shape[-1]}], as x ends; got {list(weight.shape)}")
