"""sLSTM, token by token and document by document: the definition that every other backend is compared with.

(z~, i~, f~, o~) = x_t + R h_{t-1};   m_t = max(log sigmoid(f~) + m_{t-1}, i~)
c_t = e^{log f + m_{t-1} - m_t} c_{t-1} + e^{i~ - m_t} tanh(z~);   n_t likewise with 1;   h_t = sigmoid(o~) c_t / n_t
(Beck et al. 2024, xLSTM, eq. 8 to 17.)

Legend: B rows, T tokens, H heads, K dims per head, N documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import each_document


def slstm(x_BTH4K: Tensor, R_H4KK: Tensor, state_NH4K: Tensor | None,
          borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The reference backend; arguments as in the public function, already checked and of one dtype."""

    def steps(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            h = c = n = x.new_zeros(x.shape[0], *x.shape[2:3], x.shape[4])
            m = torch.full_like(h, -torch.inf)
        else:
            h, c, n, m = state.unbind(2)
        outputs = []
        for t in range(x.shape[1]):
            z, i, f, o = (x[:, t] + torch.einsum("bhk,hgjk->bhgj", h, R_H4KK)).unbind(2)
            log_f = F.logsigmoid(f)
            m, before = torch.maximum(log_f + m, i).detach(), m
            enter, keep = (i - m).exp(), (log_f + before - m).exp()
            c, n = keep * c + enter * z.tanh(), keep * n + enter
            h = o.sigmoid() * c / n
            outputs.append(h)
        return torch.stack(outputs, 1), torch.stack([h, c, n, m], 2)

    return each_document(steps, borders, (x_BTH4K,), state_NH4K)
