"""One matrix per key head over overlapping windows of tokens, on a CPU, without a copy of all windows.

    y_e = W_g [x_1 + p_1, ..., x_L + p_L]    for the L tokens of window e, a new window every `stride` tokens

The windows of one head at a time are copied, which stays in the cache, and again in the backward.
B rows, S tokens, E windows, L tokens of a window, G key heads, K head dim, X = L K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward


def project_windows(x_BSGK: Tensor, weight_GXK: Tensor, places_LGK: Tensor | None, stride: int) -> Tensor:
    """Project every window of rows that are one document each.

    Args:
        x_BSGK: tokens.
        weight_GXK: a matrix per head over the dims of L tokens; L is a multiple of the stride.
        places_LGK: added to the tokens of a window; None adds nothing.
        stride: tokens from one window to the next.

    Returns:
        One vector per complete window and head [B, E, G, K], in the dtype of the weight.

    >>> x = torch.arange(6.0).view(1, 6, 1, 1)
    >>> project_windows(x, torch.ones(1, 4, 1), None, stride=2).flatten()
    tensor([ 6., 14.])
    """
    return _WindowProjection.apply(x_BSGK, weight_GXK, places_LGK, stride)


class _Windows:
    """The windows of one row and head, in one buffer."""

    def __init__(self, x_BSGK: Tensor, weight_GXK: Tensor, stride: int):
        self.stride, self.dim = stride, x_BSGK.shape[3]
        self.length = weight_GXK.shape[1] // self.dim
        self.parts, self.strides = self.length // stride, x_BSGK.shape[1] // stride
        self.number = self.strides - self.parts + 1
        self.tokens_ELK = weight_GXK.new_empty(self.number, self.length, self.dim)
        self.heads = [(row, head) for row in range(x_BSGK.shape[0]) for head in range(x_BSGK.shape[2])]

    def _split(self, x_SK: Tensor) -> Tensor:
        """Tokens by stride, [strides, stride, K]."""
        return x_SK[: self.strides * self.stride].unflatten(0, (self.strides, self.stride))

    def fill(self, x_SK: Tensor, places_LK: Tensor | None) -> Tensor:
        """The windows as rows of a matrix [E, X], until the next call."""
        x_NCK = self._split(x_SK)
        for part in range(self.parts):
            place = slice(part * self.stride, (part + 1) * self.stride)
            self.tokens_ELK[:, place] = x_NCK[part : part + self.number]
        if places_LK is not None:
            self.tokens_ELK += places_LK
        return self.tokens_ELK.flatten(1)

    def add_back(self, dx_SK: Tensor, d_ELK: Tensor) -> None:
        """Adds the gradients of windows to those of their tokens."""
        dx_NCK = self._split(dx_SK)
        for part in range(self.parts):
            dx_NCK[part : part + self.number] += d_ELK[:, part * self.stride : (part + 1) * self.stride]


class _WindowProjection(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, x_BSGK: Tensor, weight_GXK: Tensor, places_LGK: Tensor | None, stride: int) -> Tensor:
        windows = _Windows(x_BSGK, weight_GXK, stride)
        y_BEGK = weight_GXK.new_empty(x_BSGK.shape[0], windows.number, *x_BSGK.shape[2:])
        for row, head in windows.heads:
            places = None if places_LGK is None else places_LGK[:, head]
            y_BEGK[row, :, head] = windows.fill(x_BSGK[row, :, head], places) @ weight_GXK[head]
        ctx.stride = stride
        ctx.save_for_backward(x_BSGK, weight_GXK, places_LGK)
        return y_BEGK

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy_BEGK: Tensor) -> tuple[Tensor | None, ...]:
        x_BSGK, weight_GXK, places_LGK = ctx.saved_tensors
        windows = _Windows(x_BSGK, weight_GXK, ctx.stride)
        dx, dweight = torch.zeros_like(x_BSGK, dtype=weight_GXK.dtype), torch.zeros_like(weight_GXK)
        dplaces = None if places_LGK is None else torch.zeros_like(places_LGK)
        for row, head in windows.heads:
            places = None if places_LGK is None else places_LGK[:, head]
            dy_EK = dy_BEGK[row, :, head]
            dweight[head].addmm_(windows.fill(x_BSGK[row, :, head], places).t(), dy_EK)
            d_ELK = (dy_EK @ weight_GXK[head].t()).view(windows.number, windows.length, windows.dim)
            if dplaces is not None:
                dplaces[:, head] += d_ELK.sum(0)
            windows.add_back(dx[row, :, head], d_ELK)
        return dx.to(x_BSGK.dtype), dweight, dplaces, None
