"""Diagonal state space model that is the same at every token: one input and one output per channel (S4D, H3).

Legend: B rows, T tokens per row, C channels, M inputs that share the parameters of a channel, S pairs of modes per
channel, N documents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.diagonal_ssm import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, borders_of, without_empty_documents
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("diagonal_ssm", (
    Backend("torch", torch_backend.diagonal_ssm),
    Backend("reference", reference.diagonal_ssm),
)))


def _outputs(x_BTCM: Tensor, log_a_CS: Tensor, c_CS: Tensor, *, cu_seqlens: CuSeqlens | None = None,
             **_: Any) -> tuple[Tensor, Tensor]:
    B, _T, C, M = x_BTCM.shape
    N = B if cu_seqlens is None else cu_seqlens.num_documents
    return (x_BTCM.new_empty(x_BTCM.shape, dtype=log_a_CS.real.dtype),
            x_BTCM.new_empty((N, C, M, log_a_CS.shape[1]), dtype=log_a_CS.dtype))


@compilable(_outputs)
def diagonal_ssm(x_BTCM: Tensor, log_a_CS: Tensor, c_CS: Tensor, *, initial_state: Tensor | None = None,
                 cu_seqlens: Borders = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Run a state space model with complex diagonal transitions over every document.

        h_t = a h_{t-1} + x_t,    y_t = 2 Re sum_s c_s h_ts

    Each complex mode stands for itself and its conjugate, so y is real.

    Args:
        x_BTCM: inputs; the M inputs of a channel have states of their own, and its parameters in common.
        log_a_CS: logarithms of the factors, complex64 or complex128, with real parts of at most 0.
        c_CS: output weights, complex.
        initial_state: states before the first token of every document, [N, C, M, S]; None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No state crosses a border, and
            the state after an empty document is its initial state.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [B, T, C, M], real, and the state after the last token of every document, [N, C, M, S], complex: both in the
        precision of log_a. Differentiable in all tensors.

    Raises:
        ValueError: the shapes or number types do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Gu et al. 2022, On the parameterization and initialization of diagonal state space models, section 3.

    >>> import torch
    >>> x = torch.ones(1, 3, 1, 1)  # a = 1/2 and its conjugate, each with the weight 1/2
    >>> y, state = diagonal_ssm(x, torch.tensor([[0.5]]).log() + 0j, torch.tensor([[0.5 + 0j]]))
    >>> y.flatten(), state.flatten()
    (tensor([1.0000, 1.5000, 1.7500]), tensor([1.7500+0.j]))
    """
    if x_BTCM.dim() != 4 or 0 in x_BTCM.shape:
        raise ValueError("diagonal_ssm: x must be [batch, time, channels, inputs], none of them 0; got "
                         f"{list(x_BTCM.shape)}")
    B, T, C, M = x_BTCM.shape
    if log_a_CS.dim() != 2 or log_a_CS.shape[0] != C or c_CS.shape != log_a_CS.shape:
        raise ValueError(f"diagonal_ssm: log_a and c must be [channels, modes] = [{C}, S]; got "
                         f"{list(log_a_CS.shape)} and {list(c_CS.shape)}")
    if not log_a_CS.is_complex() or c_CS.dtype != log_a_CS.dtype or x_BTCM.is_complex():
        raise ValueError("diagonal_ssm: x must be real, log_a and c complex of one precision; got "
                         f"{x_BTCM.dtype}, {log_a_CS.dtype} and {c_CS.dtype}")
    borders = borders_of(cu_seqlens, B, T, x_BTCM.device)
    N = B if borders is None else borders.num_documents
    if initial_state is not None and initial_state.shape != (N, C, M, log_a_CS.shape[1]):
        raise ValueError(f"diagonal_ssm: initial_state must be {[N, C, M, log_a_CS.shape[1]]}; "
                         f"got {list(initial_state.shape)}")
    call = Call.of(x_BTCM, log_a_CS, c_CS, initial_state, packed=borders is not None)
    with autocast(x_BTCM.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(lambda state, filled: run(x_BTCM, log_a_CS, c_CS, state, filled), initial_state,
                                       borders)
