"""SwiGLU: silu(gate) * up, optionally clamped or softly capped. Equation and costs: README.md."""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.swiglu import reference, torch_backend
from hybridlm_kernels.ops.swiglu.soft_caps import SoftCaps as SoftCaps
from hybridlm_kernels.ops.swiglu.soft_caps import no_soft_caps as no_soft_caps
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register


def check_bounds(name: str, limit: float | None, soft_caps: SoftCaps | None) -> None:
    """Raises ValueError for a limit that is not positive, or for one beside soft caps."""
    if limit is not None and limit <= 0:
        raise ValueError(f"{name}: limit must be positive; got {limit}")
    if limit is not None and soft_caps is not None:
        raise ValueError(f"{name}: limit and soft_caps cannot stand together; got {limit} and {soft_caps}")


SWIGLU = register(Operation("swiglu", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.swiglu.triton_backend", "swiglu", no_soft_caps),
    Backend("torch", torch_backend.swiglu),
    Backend("reference", reference.swiglu))))


@compilable(lambda gate, up, **_: gate.new_empty(gate.shape), formula=reference.swiglu)
def swiglu(gate: Tensor, up: Tensor, *, limit: float | None = None, soft_caps: SoftCaps | None = None,
           backend: str | None = None) -> Tensor:
    """SwiGLU: silu(gate) * up, optionally with both clamped first, or capped by tanh (SiTU).

    Args:
        gate: raw gate, any shape; silu is applied here.
        up: raw up projection, of the same shape.
        limit: bounds gate from above and up from both sides before the product (GLM-5.3, gpt-oss). None bounds nothing.
        soft_caps: a and b of SiTU, a tanh(gate / a) sigmoid(gate) * b tanh(up / b) (Kimi K3: 4 and 25); b None leaves
            up as it is. Not with `limit`.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y in gate's shape and dtype. Differentiable in gate and up.

    Raises:
        ValueError: the shapes differ, or bounds are not positive.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Shazeer 2020, GLU Variants Improve Transformer, eq. 6; SiTU: Kimi K3, 2026.

    >>> import torch
    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([1.0, 3.0]))
    tensor([  0., 300.])
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    check_bounds("swiglu", limit, soft_caps)
    call = Call.of(gate, up, soft_caps=soft_caps is not None)
    return choose(SWIGLU, call, backend).run(gate, up, limit, soft_caps)
