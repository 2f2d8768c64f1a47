"""Reads and writes of several residual streams around a branch. Equations and costs: README.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels import triton_support
from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.streams import reference, torch_backend
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

MAX_TRITON_STREAMS = 16  # of which a program holds a tile in its registers


def _few_streams(call: Call) -> tuple[bool, str]:
    streams = call.get("streams")
    if streams > MAX_TRITON_STREAMS:
        return False, f"holds up to {MAX_TRITON_STREAMS} streams in registers; got {streams}"
    return True, ""


def _triton(function: str) -> Backend:
    return triton_support.lazy_triton_backend("hybridlm_kernels.ops.streams.triton_backend", function, _few_streams)


READ_STREAMS = register(Operation("read_streams", (
    _triton("read_streams"), Backend("torch", torch_backend.read_streams),
    Backend("reference", reference.read_streams))))
WRITE_STREAMS = register(Operation("write_streams", (
    _triton("write_streams"), Backend("torch", torch_backend.write_streams),
    Backend("reference", reference.write_streams))))


@compilable(lambda streams, *_, **__: streams.new_empty(streams.shape[:-2] + streams.shape[-1:]),
            formula=reference.read_streams)
def read_streams(streams: Tensor, read: Tensor, *, backend: str | None = None) -> Tensor:
    """Input of a branch from all residual streams: x = sum_i read_i X_i, in fp32.

    Args:
        streams: the streams X [..., M, D].
        read: weight of each stream [..., M], for every token.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        x [..., D] in the dtype of the streams. Differentiable in both.

    Raises:
        ValueError: read does not have the shape of the streams without D.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Zhu et al. 2024, Hyper-Connections (arXiv 2409.19606), eq. 3.

    >>> read_streams(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 2.0]))
    tensor([6.5000, 9.0000])
    """
    _check("read_streams", "read", read, streams.shape[:-1])
    return choose(READ_STREAMS, _call(streams, read), backend).run(streams, read)


@compilable(lambda streams, *_, **__: streams.new_empty(streams.shape), formula=reference.write_streams)
def write_streams(streams: Tensor, carry: Tensor | None, write: Tensor, output: Tensor, *,
                  backend: str | None = None) -> Tensor:
    """Residual streams after a branch: X'_j = sum_i carry_ij X_i + write_j y, in fp32.

    Args:
        streams: the streams X before the branch [..., M, D].
        carry: weight of stream i (third last dim) in the new stream j [..., M, M]; None leaves the streams unmixed.
        write: weight of the output in each stream [..., M].
        output: output y of the branch [..., D].
        backend: name of one backend, in place of the registry's choice.

    Returns:
        X' [..., M, D] in the dtype of the streams. Differentiable in all.

    Raises:
        ValueError: shapes do not fit together.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Zhu et al. 2024, Hyper-Connections (arXiv 2409.19606), eq. 4.

    >>> streams, swapped = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> write_streams(streams, swapped, torch.tensor([1.0, 2.0]), torch.tensor([10.0])).tolist()
    [[13.0], [21.0]]
    """
    _check("write_streams", "write", write, streams.shape[:-1])
    _check("write_streams", "output", output, streams.shape[:-2] + streams.shape[-1:])
    if carry is not None:
        _check("write_streams", "carry", carry, streams.shape[:-1] + streams.shape[-2:-1])
    return choose(WRITE_STREAMS, _call(streams, carry, write, output), backend).run(streams, carry, write, output)


def _call(streams: Tensor, *others: Tensor | None) -> Call:
    return Call.of(streams, *others, streams=streams.shape[-2])


def _check(operation: str, name: str, x: Tensor, expected: Any) -> None:
    if x.shape != torch.Size(expected):
        raise ValueError(f"{operation}: {name} must be {list(expected)}, as the streams are; got {list(x.shape)}")
