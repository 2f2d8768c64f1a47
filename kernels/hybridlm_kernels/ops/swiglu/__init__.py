"""SwiGLU: silu(gate) * up, optionally clamped. Equation and costs: README.md."""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.ops.swiglu import reference
from hybridlm_kernels.ops.swiglu import torch_backend as eager
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

SWIGLU = register(Operation("swiglu", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.swiglu.triton_backend", "swiglu"),
    Backend("torch", eager.swiglu),
    Backend("reference", reference.swiglu))))


def swiglu(gate: Tensor, up: Tensor, *, limit: float | None = None, backend: str | None = None) -> Tensor:
    """silu(gate) * up, in the dtype of gate.

    Args:
        gate, up: one shape, any dims.
        limit: bounds gate from above and up from both sides before the product (GLM-5.3, gpt-oss).

    Raises:
        ValueError: shapes that differ, or a limit that is not positive.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    if limit is not None and limit <= 0:
        raise ValueError(f"swiglu: limit must be positive; got {limit}")
    return choose(SWIGLU, Call.of(gate, up), backend).run(gate, up, limit)
