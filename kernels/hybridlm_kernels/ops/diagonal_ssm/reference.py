"""Diagonal state space model, token by token: the definition that every other backend is compared with.

h_t = a h_{t-1} + x_t,   y_t = 2 Re sum_s c_s h_ts   (Gu et al. 2022, S4D, section 3)

Legend: B rows, T tokens, C channels, M inputs per channel, S pairs of modes, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document


def diagonal_ssm(x_BTCM: Tensor, log_a_CS: Tensor, c_CS: Tensor, state_NCMS: Tensor | None,
                 borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked."""
    a_C1S = log_a_CS.exp()[:, None]

    def steps(x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = a_C1S.new_zeros(x.shape[0], *x.shape[2:], a_C1S.shape[-1]) if h is None else h.to(a_C1S.dtype)
        outputs = []
        for t in range(x.shape[1]):
            h = a_C1S * h + x[:, t, ..., None].to(a_C1S.real.dtype)
            outputs.append(2.0 * (c_CS[:, None] * h).sum(-1).real)
        return torch.stack(outputs, 1), h

    return each_document(steps, borders, (x_BTCM,), state_NCMS)
