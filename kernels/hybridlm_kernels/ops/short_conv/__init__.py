"""Short depthwise causal convolution along time, the token mixer in front of linear attention layers.

Legend: B rows, T tokens per row, C channels, W taps, N documents.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.short_conv import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import Borders, borders_of, without_empty_documents
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

MAX_TAPS = 8  # taps that the Triton kernels unroll


def _fits(call: Call) -> tuple[bool, str]:
    taps = call.get("taps")
    return (True, "") if 2 <= taps <= MAX_TAPS else (False, f"has 2 to {MAX_TAPS} taps; got {taps}")


OPERATION = register(Operation("short_conv", (
    lazy_triton_backend("hybridlm_kernels.ops.short_conv.triton_backend", "short_conv", _fits),
    Backend("torch", torch_backend.short_conv),
    Backend("reference", reference.short_conv),
)))


def _outputs(x_BTC: Tensor, weight_CW: Tensor, *_: Any, cu_seqlens: CuSeqlens | None = None,
             **__: Any) -> tuple[Tensor, Tensor]:
    B, _T, C = x_BTC.shape
    N = B if cu_seqlens is None else cu_seqlens.num_documents
    return x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty((N, C, weight_CW.shape[1] - 1))


@compilable(_outputs)
def short_conv(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None, *,
               activation: Literal["silu"] | None = None, initial_state: Tensor | None = None,
               cu_seqlens: Borders = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Short depthwise causal convolution along time, with one filter of W taps per channel.

        y_t = act(bias + sum_w weight_w * x_{t-W+1+w})

    The last tap multiplies the current token.

    Args:
        x_BTC: inputs, raw (the outputs of a projection).
        weight_CW: one filter of W taps per channel.
        bias_C: added before the activation; None is zero.
        activation: "silu" or None, applied to the sum.
        initial_state: the last W - 1 inputs before the first token of every document, oldest first, [N, C, W-1];
            None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No tap reaches over a border.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        y [B, T, C] in x's dtype, computed in float32 at least, and the last W - 1 inputs of every document,
        [N, C, W-1] in x's dtype. A document of fewer tokens, also of none, keeps the end of its initial state.

    Raises:
        ValueError: the shapes do not fit one another, the borders do not cover the tokens, or the activation is
            unknown.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Fu et al. 2023, H3 (shift of the keys along time); Gu and Dao 2023, Mamba (as a depthwise convolution).

    >>> import torch
    >>> x = torch.arange(1.0, 5.0).view(1, 4, 1)
    >>> y, state = short_conv(x, weight_CW=torch.tensor([[10.0, 1.0]]))  # ten times the token before, and itself
    >>> y.flatten(), state.flatten()
    (tensor([ 1., 12., 23., 34.]), tensor([4.]))
    """
    if x_BTC.dim() != 3 or 0 in x_BTC.shape:
        raise ValueError("short_conv: x must be [batch, time, channels], none of them 0; "
                         f"got {list(x_BTC.shape)}")
    B, T, C = x_BTC.shape
    if weight_CW.dim() != 2 or weight_CW.shape[0] != C or weight_CW.shape[1] < 1:
        raise ValueError(f"short_conv: weight must be [{C} channels, taps]; got {list(weight_CW.shape)}")
    if bias_C is not None and bias_C.shape != (C,):
        raise ValueError(f"short_conv: bias must be [{C}]; got {list(bias_C.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation must be 'silu' or None; got {activation!r}")
    borders = borders_of(cu_seqlens, B, T, x_BTC.device)
    N, W = B if borders is None else borders.num_documents, weight_CW.shape[1]
    if initial_state is not None and initial_state.shape != (N, C, W - 1):
        raise ValueError("short_conv: initial_state must be [documents, channels, taps - 1] = "
                         f"{[N, C, W - 1]}; got {list(initial_state.shape)}")
    call = Call.of(x_BTC, weight_CW, bias_C, initial_state, taps=W, packed=borders is not None)
    with autocast(x_BTC.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(
            lambda state, filled: run(x_BTC, weight_CW, bias_C, activation, state, filled), initial_state, borders)
