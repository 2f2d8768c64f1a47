"""Linear scan: a recurrence of independent channels, real or complex (HGRN, RG-LRU, minGRU, GateLoop, S4D).

Legend: B rows, T tokens per row, C channels, N documents.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.linear_scan import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, borders_of, without_empty_documents
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

OPERATION = register(Operation("linear_scan", (
    lazy_triton_backend("hybridlm_kernels.ops.linear_scan.triton_backend", "linear_scan"),
    Backend("torch", torch_backend.linear_scan),
    Backend("reference", reference.linear_scan),
)))


def _result_dtype(*tensors: Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None], torch.float32)


def _outputs(x_BTC: Tensor, a_BTC: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: CuSeqlens | None = None,
             **_: Any) -> tuple[Tensor, Tensor]:
    (B, _T, C), dtype = x_BTC.shape, _result_dtype(x_BTC, a_BTC, initial_state)
    N = B if cu_seqlens is None else cu_seqlens.num_documents
    return x_BTC.new_empty(x_BTC.shape, dtype=dtype), x_BTC.new_empty((N, C), dtype=dtype)


@compilable(_outputs)
def linear_scan(x_BTC: Tensor, a_BTC: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Borders = None,
                backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Scan channels along time: each is a number that is multiplied by a factor and takes an input at every token.

        h_t = a_t h_{t-1} + x_t

    Args:
        x_BTC: inputs, real or complex.
        a_BTC: factors, of absolute value at most 1; 0 forgets everything. Expand a constant factor to all tokens.
        initial_state: state before the first token of every document, [N, C]; None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No state crosses a border, and
            the state after an empty document is its initial state.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        h [B, T, C], and the state after the last token of every document, [N, C]: both in float32 (float64 where an
        input is float64; complex of that precision where an input is complex).

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Martin and Cundy 2018, Parallelizing linear recurrent neural nets, eq. 5; De et al. 2024, Griffin, eq. 4.

    >>> x = torch.ones(1, 3, 1)
    >>> h, state = linear_scan(x, 0.5 * x)  # the state halves before every token
    >>> h.flatten(), state.flatten()
    (tensor([1.0000, 1.5000, 1.7500]), tensor([1.7500]))
    """
    if x_BTC.dim() != 3 or 0 in x_BTC.shape:
        raise ValueError(f"linear_scan: x must be [batch, time, channels], none of them 0; got {list(x_BTC.shape)}")
    if a_BTC.shape != x_BTC.shape:
        raise ValueError(f"linear_scan: a must have the shape of x, {list(x_BTC.shape)}; got {list(a_BTC.shape)}")
    B, T, C = x_BTC.shape
    borders = borders_of(cu_seqlens, B, T, x_BTC.device)
    N = B if borders is None else borders.num_documents
    if initial_state is not None and initial_state.shape != (N, C):
        raise ValueError(f"linear_scan: initial_state must be [documents, channels] = {[N, C]}; "
                         f"got {list(initial_state.shape)}")
    present = [x_BTC, a_BTC, *([] if initial_state is None else [initial_state])]
    dtype = _result_dtype(*present)
    widest = next((t for t in present if t.dtype == dtype), x_BTC)  # its dtype decides which backend serves
    call = Call.of(widest, *present, packed=borders is not None)
    with autocast(x_BTC.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(lambda state, filled: run(x_BTC, a_BTC, state, filled, dtype), initial_state,
                                       borders)
