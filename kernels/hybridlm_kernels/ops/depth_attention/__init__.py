"""Softmax attention of one learned query to the sources of each token, over depth. Equation and costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.depth_attention import reference, torch_backend
from hybridlm_kernels.registry import Backend, Call, Operation, choose, is_configured, register

MAX_TRITON_SOURCES = 8  # each is an argument of the kernel
MAX_TRITON_WIDTH = 4096  # a program holds rows in its registers; twice that would spill


def _supports(call: Call) -> tuple[bool, str]:
    if call.get("sources") > MAX_TRITON_SOURCES:
        return False, f"takes up to {MAX_TRITON_SOURCES} sources; got {call.get('sources')}"
    if call.get("width") > MAX_TRITON_WIDTH:
        return False, f"holds rows of up to {MAX_TRITON_WIDTH} in registers; got {call.get('width')}"
    return True, ""


DEPTH_ATTENTION = register(Operation("depth_attention", (
    triton_support.lazy_triton_backend("hybridlm_kernels.ops.depth_attention.triton_backend", "depth_attention",
                                       _supports),
    Backend("torch", torch_backend.depth_attention), Backend("reference", reference.depth_attention))))


@compilable(lambda query, sources, *_, **__: sources[-1].new_empty(sources[-1].shape),
            formula=reference.depth_attention)
def depth_attention(query: Tensor, sources: Sequence[Tensor], eps: float, *, backend: str | None = None) -> Tensor:
    """Attention of one query to S sources per token: x = sum_i softmax_i(q . v_i / rms(v_i)) v_i, in fp32.

    Args:
        query: the query q [D].
        sources: the sources v_i, each [..., D], or all in one tensor [S, ..., D]. They are read where they are.
        eps: added to the mean square of a source.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        x [..., D] in the dtype of the last source. Differentiable in query and sources.

    Raises:
        ValueError: there is no source, or shapes differ.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Attention Residuals (arXiv 2603.15031), whose keys are the sources divided by their rms.

    >>> import torch
    >>> depth_attention(torch.zeros(2), [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], 1e-6)
    tensor([2., 4.])
    """
    sources = tuple(sources)
    if not sources:
        raise ValueError("depth_attention: needs at least one source; got none")
    shape = sources[-1].shape
    for index, source in enumerate(sources):
        if source.shape != shape:
            raise ValueError(f"depth_attention: all sources must have the shape of the last one, {list(shape)}; got "
                             f"{list(source.shape)} at place {index}")
    if query.shape != shape[-1:]:
        raise ValueError(f"depth_attention: query must be {list(shape[-1:])}; got {list(query.shape)}")
    call = Call.of(sources[-1], query, *sources[:-1], sources=len(sources), width=shape[-1])
    if backend is None and not is_configured(DEPTH_ATTENTION.name) and not _supports(call)[0]:
        backend = "torch"  # as for every size before there was a kernel: no error on a GPU
    return choose(DEPTH_ATTENTION, call, backend).run(query, sources, eps)
