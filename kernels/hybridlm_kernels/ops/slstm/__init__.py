"""sLSTM: a recurrent network with exponential gates whose hidden state feeds its gates (xLSTM).

Legend: B rows, T tokens per row, H heads, K dims per head, N documents; 4 gates: z, i, f, o.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.slstm import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, borders_of, math_dtype, without_empty_documents
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("slstm", (
    Backend("torch", torch_backend.slstm), Backend("reference", reference.slstm))))


def _outputs(x_BTH4K: Tensor, R_H4KK: Tensor, *, cu_seqlens: CuSeqlens | None = None,
             **_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _four, K = x_BTH4K.shape
    N = B if cu_seqlens is None else cu_seqlens.num_documents
    dtype = math_dtype(x_BTH4K)
    return x_BTH4K.new_empty((B, T, H, K), dtype=dtype), x_BTH4K.new_empty((N, H, 4, K), dtype=dtype)


@compilable(_outputs)
def slstm(x_BTH4K: Tensor, R_H4KK: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Borders = None,
          backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Run sLSTM along time, token by token: its hidden state enters the gates, so no chunk can be skipped.

        (z~, i~, f~, o~) = x_t + R h_{t-1}
        c_t = f c_{t-1} + e^{i~} tanh(z~),   n_t = f n_{t-1} + e^{i~},   f = sigmoid(f~)
        h_t = sigmoid(o~) c_t / n_t

    c and n are kept divided by e^{m_t}, m_t = max(log f + m_{t-1}, i~), on which h does not depend.

    Args:
        x_BTH4K: what the token gives to the gates z, i, f, o, before their activations, biases included.
        R_H4KK: for each head and gate the matrix [K, K] that the hidden state of the head is multiplied by.
        initial_state: h, c, n, m before the first token of every document, [N, H, 4, K]; None: h, c, n are 0 and m is
            -inf. It gets no gradient.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No state crosses a border, and
            the state after an empty document is its initial state, zeros without one.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        h [B, T, H, K], and h, c, n, m after the last token of every document, [N, H, 4, K], without gradient: both in
        float32 (float64 for float64 x).

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Beck et al. 2024, xLSTM, section 2.2 and appendix A.1.

    >>> import torch
    >>> x = torch.zeros(1, 2, 1, 4, 1)
    >>> x[..., 0, :] = 100.0  # tanh(z) is 1, and so is the mean c / n; the output gate is a half
    >>> slstm(x, torch.zeros(1, 4, 1, 1))[0].flatten()
    tensor([0.5000, 0.5000])
    """
    if x_BTH4K.dim() != 5 or x_BTH4K.shape[3] != 4 or 0 in x_BTH4K.shape:
        raise ValueError(f"slstm: x must be [batch, time, heads, 4, dim], none of them 0; got {list(x_BTH4K.shape)}")
    B, T, H, _four, K = x_BTH4K.shape
    if R_H4KK.shape != (H, 4, K, K):
        raise ValueError(f"slstm: R must be [heads, 4, dim, dim] = {[H, 4, K, K]}; got {list(R_H4KK.shape)}")
    borders = borders_of(cu_seqlens, B, T, x_BTH4K.device)
    N = B if borders is None else borders.num_documents
    if initial_state is not None and initial_state.shape != (N, H, 4, K):
        raise ValueError(f"slstm: initial_state must be [documents, heads, 4, dim] = {[N, H, 4, K]}; "
                         f"got {list(initial_state.shape)}")
    call = Call.of(x_BTH4K, R_H4KK, initial_state, packed=borders is not None)
    dtype = math_dtype(x_BTH4K)
    start = None if initial_state is None else initial_state.detach().to(dtype)
    with autocast(x_BTH4K.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        h, last = without_empty_documents(
            lambda state, filled: run(x_BTH4K.to(dtype), R_H4KK.to(dtype), state, filled), start, borders)
    return h, last.detach()
