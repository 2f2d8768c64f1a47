"""Short depthwise causal convolution along time, the token mixer in front of linear attention layers.

Legend: B rows, T tokens a row, C channels, W taps, N documents.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, autocast

from hybridlm_kernels.ops.short_conv import reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders, borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

MOST_TAPS = 8  # of the Triton kernels, which unroll them


def _fits(call: Call) -> tuple[bool, str]:
    taps = call.get("taps")
    return (True, "") if 2 <= taps <= MOST_TAPS else (False, f"has 2 to {MOST_TAPS} taps; got {taps}")


OPERATION = register(Operation("short_conv", (
    lazy_triton_backend("hybridlm_kernels.ops.short_conv.triton_backend", "short_conv", _fits),
    Backend("torch", torch_backend.short_conv),
    Backend("reference", reference.short_conv),
)))


def short_conv(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None, *,
               activation: Literal["silu"] | None = None, initial_state: Tensor | None = None,
               cu_seqlens: Borders = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_w weight_w * x_{t-W+1+w}): tap W-1 is the current token.

    Args:
        x_BTC: inputs. weight_CW: one filter a channel. bias_C: optional.
        activation: "silu" or None.
        initial_state: [N, C, W-1], the last inputs before the first token, oldest first; None is zero.
        cu_seqlens: borders of packed documents over the flattened B*T tokens, row starts included. N is the
            number of documents, or B without borders. Taps never reach over a border.
        backend: name one backend instead of the registry's choice.

    Returns:
        y [B, T, C] in x's dtype (computed in float32 at least), and the last W-1 inputs of every document,
        [N, C, W-1] in x's dtype; a document shorter than that keeps the end of its initial state.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation. KernelUnavailable: no backend can run.
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
        return choose(OPERATION, call, backend).run(
            x_BTC, weight_CW, bias_C, activation, initial_state, borders)
