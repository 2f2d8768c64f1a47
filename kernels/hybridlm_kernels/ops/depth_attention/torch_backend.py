"""Attention over sources, piece by piece of tokens; scores and inverse norms are kept, no copy of a source.

N tokens, Q of a piece, S sources, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.precision import plain_backward, wide

CPU_PIECE_ELEMENTS = 2**17  # of one source: its copies in fp32 and its products stay in the cache
GPU_PIECE_ELEMENTS = 2**26


def depth_attention(query: Tensor, sources: Sequence[Tensor], eps: float) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    return _DepthAttention.apply(query, eps, *sources)


def _pieces(x_ND: Tensor) -> Iterator[slice]:
    """Pieces of consecutive tokens."""
    most = CPU_PIECE_ELEMENTS if x_ND.device.type == "cpu" else GPU_PIECE_ELEMENTS
    step = max(1, most // max(1, x_ND.shape[1]))
    for start in range(0, x_ND.shape[0], step):
        yield slice(start, start + step)


class _DepthAttention(torch.autograd.Function):
    """ds_i = p_i (dx . v_i - sum_j p_j dx . v_j);  dv_i = p_i dx + ds_i r_i (q - s_i r_i v_i / D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, eps: float, *sources: Tensor) -> Tensor:
        q_D, rows = wide(query), [source.reshape(-1, source.shape[-1]) for source in sources]
        tokens = rows[0].shape[0]
        score_NS, inverse_NS = (q_D.new_empty(tokens, len(sources)) for _ in range(2))
        x_ND = torch.empty(rows[-1].shape, dtype=rows[-1].dtype, device=rows[-1].device)
        for piece in _pieces(rows[0]):
            values = [wide(row_ND[piece]) for row_ND in rows]
            for index, value_QD in enumerate(values):
                inverse_Q = torch.rsqrt(value_QD.square().mean(-1) + eps)
                inverse_NS[piece, index] = inverse_Q
                score_NS[piece, index] = (value_QD * q_D).sum(-1) * inverse_Q
            weight_QS = score_NS[piece].softmax(-1)
            mixed_QD = weight_QS[:, :1] * values[0]
            for index, value_QD in enumerate(values[1:], start=1):
                mixed_QD.addcmul_(weight_QS[:, index : index + 1], value_QD)
            x_ND[piece] = mixed_QD
        ctx.save_for_backward(query, score_NS, inverse_NS, *sources)
        return x_ND.view(sources[-1].shape)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        query, score_NS, inverse_NS, *sources = ctx.saved_tensors
        q_D, dx_ND = wide(query), dx.reshape(-1, dx.shape[-1])
        rows = [source.reshape(-1, source.shape[-1]) for source in sources]
        dq_D = torch.zeros_like(q_D)
        found = [torch.empty(row.shape, dtype=row.dtype, device=row.device) for row in rows]
        for piece in _pieces(rows[0]):
            dx_QD, values = wide(dx_ND[piece]), [wide(row_ND[piece]) for row_ND in rows]
            weight_QS, score_QS, inverse_QS = score_NS[piece].softmax(-1), score_NS[piece], inverse_NS[piece]
            dweight_QS = torch.stack([(dx_QD * value_QD).sum(-1) for value_QD in values], -1)
            dscore_QS = weight_QS * (dweight_QS - (weight_QS * dweight_QS).sum(-1, keepdim=True))
            towards_QS = dscore_QS * inverse_QS  # of the query
            away_QS = -towards_QS * score_QS * inverse_QS / q_D.shape[0]  # of the source
            for index, value_QD in enumerate(values):
                dvalue_QD = weight_QS[:, index, None] * dx_QD
                dvalue_QD.addcmul_(towards_QS[:, index, None], q_D).addcmul_(away_QS[:, index, None], value_QD)
                found[index][piece] = dvalue_QD
                dq_D += (towards_QS[:, index, None] * value_QD).sum(0)
        grads = [grad_ND.view(source.shape) for grad_ND, source in zip(found, sources, strict=True)]
        return dq_D.to(query.dtype), None, *grads
