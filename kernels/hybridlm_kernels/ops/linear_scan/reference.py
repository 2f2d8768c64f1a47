"""Linear scan, token by token: the definition that every other backend is compared with.

h_t = a_t h_{t-1} + x_t
(Martin and Cundy 2018, eq. 5; Gu and Dao 2023, Mamba, section 3.3; De et al. 2024, Griffin, eq. 4.)

Legend: B rows, T tokens, C channels, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document


def linear_scan(x_BTC: Tensor, a_BTC: Tensor, state_NC: Tensor | None, borders: CuSeqlens | None,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked, computed in `dtype`."""

    def steps(x: Tensor, a: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        x, a = x.to(dtype), a.to(dtype)
        h = x.new_zeros(x.shape[0], x.shape[2]) if h is None else h.to(dtype)
        states = []
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            states.append(h)
        return (torch.stack(states, 1) if states else x), h

    return each_document(steps, borders, (x_BTC, a_BTC), state_NC)
