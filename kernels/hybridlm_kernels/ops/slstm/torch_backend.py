"""sLSTM in torch operations: one step per token for all rows, which start anew where a document does.

The backward goes back over the tokens with what the forward kept; the gradient of R is one product at the end. c and n
are divided by e^m, and h = o c / n does not depend on m, so m is a constant to the gradient:

    dc += dh o / n          dn -= dh o c / n^2          di~ = (dc tanh(z~) + dn) i
    dz~ = dc i (1 - z^2)    df~ = (dc c_{t-1} + dn n_{t-1}) f sigmoid(-f~)          do~ = dh c / n o (1 - o)
    before t: dc f, dn f, dh = R^T (dz~, di~, df~, do~)

Legend: B rows, T tokens, H heads, K dims per head, N documents, M documents that have tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.document_ends import find_document_ends


def slstm(x_BTH4K: Tensor, R_H4KK: Tensor, state_NH4K: Tensor | None,
          borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked and of one dtype."""
    B, T, H, _, K = x_BTH4K.shape
    ends = find_document_ends(B, T, borders, x_BTH4K.device)
    first_BT = torch.zeros(B * T, dtype=torch.bool, device=x_BTH4K.device).index_fill(0, ends.first_M, True)
    start_BTH4K = None
    if state_NH4K is not None:
        start_BTH4K = x_BTH4K.new_zeros(B * T, H, 4, K).index_copy(0, ends.first_M, ends.at_documents(state_NH4K))
        start_BTH4K = start_BTH4K.view(B, T, H, 4, K)
    begins = _tokens_where_documents_begin(B, T, borders)
    h_BTHK, states_BTH4K = _TorchSLSTM.apply(x_BTH4K, R_H4KK, first_BT.view(B, T), start_BTH4K, begins)
    return h_BTHK, states_BTH4K.flatten(0, 1).index_select(0, ends.last_M)


def _tokens_where_documents_begin(batch: int, length: int, borders: CuSeqlens | None) -> frozenset[int]:
    """The columns in which a document begins in some row."""
    return frozenset({0}) if borders is None else frozenset(start % length for start in borders.host[:-1])


class _TorchSLSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, first: Tensor, start: Tensor | None, begins: frozenset[int]) -> Any:
        B, T, H, _, K = x.shape
        # [H, K, 4 K]: the matrices of all gates side by side, one product per step.
        R_HKX = R.permute(0, 3, 1, 2).reshape(H, K, 4 * K)
        h = c = n = x.new_zeros(B, H, K)
        m = torch.full_like(h, -torch.inf)
        kept = x.new_empty(T, 9, B, H, K)
        for t in range(T):
            if t in begins:
                h, c, n, m = _restart((h, c, n, m), first[:, t], None if start is None else start[:, t])
            gates = x[:, t] + torch.bmm(h.transpose(0, 1), R_HKX).transpose(0, 1).unflatten(-1, (4, K))
            z, i, f, o = gates.unbind(2)
            log_f = F.logsigmoid(f)
            next_m = torch.maximum(log_f + m, i)
            z, enter, keep, o = z.tanh(), (i - next_m).exp(), (log_f + m - next_m).exp(), o.sigmoid()
            torch.stack([z, enter, keep, (-f).sigmoid(), o, h, c, n, next_m], out=kept[t])
            c, n, m = keep * c + enter * z, keep * n + enter, next_m
            h = o * c / n
        # After each token: h, c, n are those before the next one, where no document begins there.
        z, enter, keep, _, o, _, c_before, n_before, m_TBHK = kept.unbind(1)
        c_TBHK, n_TBHK = keep * c_before + enter * z, keep * n_before + enter
        h_TBHK = o * c_TBHK / n_TBHK
        ctx.save_for_backward(R, first, kept)
        ctx.begins = begins
        states = torch.stack([h_TBHK, c_TBHK, n_TBHK, m_TBHK], 3).transpose(0, 1)
        ctx.mark_non_differentiable(states)
        return h_TBHK.transpose(0, 1).contiguous(), states

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dh_BTHK: Tensor, _: Tensor) -> Any:
        R, first, kept = ctx.saved_tensors
        T, _nine, B, H, K = kept.shape
        R_HXK = R.reshape(H, 4 * K, K)
        d_gates = kept.new_empty(T, B, H, 4, K)
        dh = dc = dn = kept.new_zeros(B, H, K)
        for t in reversed(range(T)):
            z, enter, keep, not_f, o, _h, c_before, n_before, _m = kept[t].unbind(0)
            c, n = keep * c_before + enter * z, keep * n_before + enter
            dh = dh + dh_BTHK[:, t]
            mean = c / n
            d_mean = dh * o / n
            dc, dn = dc + d_mean, dn - d_mean * mean
            torch.stack([dc * enter * (1 - z * z), (dc * z + dn) * enter,
                         (dc * c_before + dn * n_before) * keep * not_f, dh * mean * o * (1 - o)], 2, out=d_gates[t])
            dh = torch.bmm(d_gates[t].flatten(2).transpose(0, 1), R_HXK).transpose(0, 1)
            dc, dn = dc * keep, dn * keep
            if t in ctx.begins:
                dh, dc, dn = (torch.where(first[:, t, None, None], 0.0, x) for x in (dh, dc, dn))
        dR = torch.einsum("tbhgj,tbhk->hgjk", d_gates, kept[:, 5]) if ctx.needs_input_grad[1] else None
        return d_gates.transpose(0, 1), dR, None, None, None


def _restart(state: tuple[Tensor, ...], first_B: Tensor, start_BH4K: Tensor | None) -> tuple[Tensor, ...]:
    """h, c, n, m [B, H, K], in rows where a document begins replaced by its initial state."""
    h = state[0]
    fresh: tuple[Tensor, ...]
    if start_BH4K is None:
        zeros = torch.zeros_like(h)
        fresh = (zeros, zeros, zeros, torch.full_like(h, -torch.inf))
    else:
        fresh = start_BH4K.unbind(2)
    return tuple(torch.where(first_B[:, None, None], new, old) for new, old in zip(fresh, state, strict=True))
