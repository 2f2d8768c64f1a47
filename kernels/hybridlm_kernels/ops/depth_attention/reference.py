"""Softmax attention over sources of one token as its equation says, in fp32 or better.

S sources, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridlm_kernels.precision import wide


def depth_attention(query: Tensor, sources: Sequence[Tensor], eps: float) -> Tensor:
    """x = sum_i softmax_i(q . v_i / rms(v_i)) v_i."""
    values = [wide(source) for source in sources]
    # Products over D by hand: autocast would round a matrix product, and stacking would copy all sources.
    scores = [(value * wide(query)).sum(-1) * torch.rsqrt(value.square().mean(-1) + eps) for value in values]
    weight = torch.stack(scores, -1).softmax(-1)
    mixed = weight[..., :1] * values[0]
    for index, value in enumerate(values[1:], start=1):
        mixed = torch.addcmul(mixed, weight[..., index : index + 1], value)
    return mixed.to(sources[-1].dtype)
