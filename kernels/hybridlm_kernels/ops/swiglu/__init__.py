"""SwiGLU: silu(gate) * up, optionally clamped. Equation and costs: README.md."""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.swiglu import reference, torch_backend
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

SWIGLU = register(Operation("swiglu", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.swiglu.triton_backend", "swiglu"),
    Backend("torch", torch_backend.swiglu),
    Backend("reference", reference.swiglu))))


@compilable(lambda gate, up, **_: gate.new_empty(gate.shape), formula=reference.swiglu)
def swiglu(gate: Tensor, up: Tensor, *, limit: float | None = None, backend: str | None = None) -> Tensor:
    """SwiGLU: silu(gate) * up, optionally with both clamped first.

    Args:
        gate: raw gate, any shape; silu is applied here.
        up: raw up projection, of the same shape.
        limit: bounds gate from above and up from both sides before the product (GLM-5.3, gpt-oss). None bounds nothing.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y in gate's shape and dtype. Differentiable in gate and up.

    Raises:
        ValueError: the shapes differ, or limit is not positive.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Shazeer 2020, GLU Variants Improve Transformer, eq. 6.

    >>> import torch
    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([1.0, 3.0]))
    tensor([  0., 300.])
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    if limit is not None and limit <= 0:
        raise ValueError(f"swiglu: limit must be positive; got {limit}")
    return choose(SWIGLU, Call.of(gate, up), backend).run(gate, up, limit)
