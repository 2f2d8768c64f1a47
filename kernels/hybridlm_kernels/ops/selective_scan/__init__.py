"""Selective scan: many small states per channel, with factors that depend on channel, state and token (Mamba-1).

Legend: R rows, T tokens per row, D channels, N states per channel, M documents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.selective_scan import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, borders_of, math_dtype, without_empty_documents
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

MAX_STATES = 64  # states per channel that the Triton kernels keep in registers


def _fits(call: Call) -> tuple[bool, str]:
    states = call.get("states")
    return (True, "") if states <= MAX_STATES else (False, f"has up to {MAX_STATES} states per channel; got {states}")


OPERATION = register(Operation("selective_scan", (
    lazy_triton_backend("hybridlm_kernels.ops.selective_scan.triton_backend", "selective_scan", _fits),
    Backend("torch", torch_backend.selective_scan),
    Backend("reference", reference.selective_scan),
)))


def _outputs(x_RTD: Tensor, dt_RTD: Tensor, A_DN: Tensor | None, B_RTN: Tensor, C_RTN: Tensor, *,
             cu_seqlens: CuSeqlens | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    R, _T, D = x_RTD.shape
    M = R if cu_seqlens is None else cu_seqlens.num_documents
    return x_RTD.new_empty(x_RTD.shape), x_RTD.new_empty((M, D, B_RTN.shape[-1]), dtype=math_dtype(x_RTD))


@compilable(_outputs)
def selective_scan(x_RTD: Tensor, dt_RTD: Tensor, A_DN: Tensor | None, B_RTN: Tensor, C_RTN: Tensor, *,
                   initial_state: Tensor | None = None, cu_seqlens: Borders = None,
                   backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Selective scan: each channel has N states, which decay, take the input, and are read, all as the token says.

        h_t[d, n] = f_t[d, n] h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d],      y_t[d] = sum_n C_t[n] h_t[d, n]
        f_t[d, n] = exp(dt_t[d] A[d, n])                                  with A (Mamba)
        f_t[d, n] = 1 - dt_t[d] B_t[n]^2                                  without (Longhorn, diagonal)

    Args:
        x_RTD: inputs, activated.
        dt_RTD: step sizes, activated: positive; in Longhorn beta / (1 + beta |B|^2).
        A_DN: decay rates, negative; None takes the factor of Longhorn.
        B_RTN: how each token writes to the states, the same for all channels.
        C_RTN: how each token reads them.
        initial_state: states before the first token of every document, [M, D, N]; None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened R T tokens, with the start of every row
            among them. M is the number of documents, or R without borders. No state crosses a border, and
            the state after an empty document is its initial state.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [R, T, D] in the dtype of x, and the states after the last token of every document, [M, D, N], in float32
        (float64 for float64 inputs). Factors and states are computed in that dtype.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Gu and Dao 2023, Mamba, algorithm 2; Liu et al. 2024, Longhorn, section 3.2.

    >>> import torch
    >>> ones = torch.ones(1, 3, 1)
    >>> y, state = selective_scan(ones, ones, torch.tensor([[0.5]]).log(), ones, ones)  # the state halves
    >>> y.flatten(), state.flatten()
    (tensor([1.0000, 1.5000, 1.7500]), tensor([1.7500]))
    """
    if x_RTD.dim() != 3 or 0 in x_RTD.shape:
        raise ValueError(f"selective_scan: x must be [batch, time, channels], none of them 0; got {list(x_RTD.shape)}")
    R, T, D = x_RTD.shape
    N = B_RTN.shape[-1]
    borders = borders_of(cu_seqlens, R, T, x_RTD.device)
    M = R if borders is None else borders.num_documents
    shapes = {"dt": (dt_RTD, (R, T, D)), "A": (A_DN, (D, N)), "B": (B_RTN, (R, T, N)), "C": (C_RTN, (R, T, N)),
              "initial_state": (initial_state, (M, D, N))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and (tuple(tensor.shape) != shape or 0 in shape[1:]):
            raise ValueError(f"selective_scan: {name} must be {list(shape)}; got {list(tensor.shape)}")
    call = Call.of(x_RTD, dt_RTD, A_DN, B_RTN, C_RTN, initial_state, states=N, packed=borders is not None)
    with autocast(x_RTD.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(
            lambda state, filled: run(x_RTD, dt_RTD, A_DN, B_RTN, C_RTN, state, filled), initial_state, borders)
