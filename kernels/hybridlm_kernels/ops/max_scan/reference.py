"""Scan of falling maxima, token by token: the definition that every other backend is compared with.

m_t = max(m_{t-1} + g_t, x_t)   (Beck et al. 2024, xLSTM, eq. 15)

Legend: B rows, T tokens, C channels, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document


def max_scan(x_BTC: Tensor, g_BTC: Tensor, state_NC: Tensor, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked."""

    def steps(x: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        states = []
        for t in range(x.shape[1]):
            m = torch.maximum(m + g[:, t], x[:, t])
            states.append(m)
        return torch.stack(states, 1), m

    return each_document(steps, borders, (x_BTC, g_BTC), state_NC)
