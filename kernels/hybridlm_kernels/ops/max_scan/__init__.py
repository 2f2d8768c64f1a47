"""Scan of maxima that fall along time: by how much exponential sums must be divided to stay finite (mLSTM, RWKV-4).

Legend: B rows, T tokens per row, C channels, N documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.max_scan import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, borders_of, math_dtype, without_empty_documents
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("max_scan", (
    Backend("torch", torch_backend.max_scan), Backend("reference", reference.max_scan))))


def _outputs(x_BTC: Tensor, g_BTC: Tensor, *, cu_seqlens: CuSeqlens | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    (B, _T, C), dtype = x_BTC.shape, math_dtype(x_BTC)
    N = B if cu_seqlens is None else cu_seqlens.num_documents
    return x_BTC.new_empty(x_BTC.shape, dtype=dtype), x_BTC.new_empty((N, C), dtype=dtype)


@compilable(_outputs)
def max_scan(x_BTC: Tensor, g_BTC: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Borders = None,
             backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Scan maxima along time, which fall by -g at every token; without gradient.

        m_t = max(m_{t-1} + g_t, x_t)

    With x the logarithms of what each token adds to a sum and g those of its decay, every term of the sum is at most 1
    after division by e^m, and one of them is 1. What is divided by e^m above and below a fraction bar does not depend
    on m, so m needs no gradient.

    Args:
        x_BTC: logarithms of what is added.
        g_BTC: logarithms of decays, at most 0; -inf forgets everything.
        initial_state: m before the first token of every document, [N, C]; None is -inf.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No state crosses a border, and
            the state after an empty document is its initial state.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        m [B, T, C], and m after the last token of every document, [N, C]: both in float32 (float64 for float64 x).

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Beck et al. 2024, xLSTM, eq. 15; Peng et al. 2023, RWKV, appendix D.

    >>> x = torch.tensor([0.0, -5.0, 1.0]).view(1, 3, 1)
    >>> max_scan(x, torch.full_like(x, -2.0))[0].flatten()
    tensor([ 0., -2.,  1.])
    """
    if x_BTC.dim() != 3 or 0 in x_BTC.shape:
        raise ValueError(f"max_scan: x must be [batch, time, channels], none of them 0; got {list(x_BTC.shape)}")
    if g_BTC.shape != x_BTC.shape:
        raise ValueError(f"max_scan: g must have the shape of x, {list(x_BTC.shape)}; got {list(g_BTC.shape)}")
    B, T, C = x_BTC.shape
    borders = borders_of(cu_seqlens, B, T, x_BTC.device)
    N = B if borders is None else borders.num_documents
    if initial_state is not None and initial_state.shape != (N, C):
        raise ValueError(f"max_scan: initial_state must be [documents, channels] = {[N, C]}; "
                         f"got {list(initial_state.shape)}")
    call = Call.of(x_BTC, g_BTC, initial_state, packed=borders is not None)
    dtype = math_dtype(x_BTC)
    start = x_BTC.new_full((N, C), -torch.inf, dtype=dtype) if initial_state is None else initial_state
    with autocast(x_BTC.device.type, enabled=False), torch.no_grad():
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(lambda state, filled: run(x_BTC.to(dtype), g_BTC.to(dtype), state, filled),
                                       start.to(dtype), borders)
