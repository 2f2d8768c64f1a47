"""Depthwise causal convolution tap by tap: the definition that every other backend is compared with.

y_t = act(bias + sum_w weight_w x_{t-W+1+w}), with x before the first token taken from the state (or zero).

Legend: B rows, T tokens, C channels, W taps (the last is the current token), N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document, math_dtype


def short_conv(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None,
               state_NCW: Tensor | None, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked. `state_NCW` holds W - 1 inputs."""
    dtype = math_dtype(x_BTC)
    weight, W = weight_CW.to(dtype), weight_CW.shape[1]

    def taps(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        B, T, C = x.shape
        before = x.new_zeros(B, C, W - 1) if state is None else state
        x = torch.cat([before.to(dtype).mT, x.to(dtype)], dim=1)
        y = sum((x[:, w : w + T] * weight[:, w] for w in range(W)), start=x.new_zeros(B, T, C))
        y = y if bias_C is None else y + bias_C.to(dtype)
        return y * y.sigmoid() if activation == "silu" else y, x[:, T:].mT

    y, state = each_document(taps, borders, (x_BTC,), state_NCW)
    return y.to(x_BTC.dtype), state.to(x_BTC.dtype)
