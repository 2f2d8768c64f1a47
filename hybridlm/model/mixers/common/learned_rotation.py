"""LRPE-d: scores of queries and keys times cosines of learned angles, for each dim of each head (TransNormerLLM).

    q_t^T k_s  becomes  sum_i q_ti k_si cos((t - s) theta_i),   as a product of [x cos(t theta), x sin(t theta)]

Source: Qin et al. 2023 (TransNormerLLM), section 3.1.1; Qin et al. 2023 (LRPE); the released code (`Lrpe`).
B rows, T tokens, H heads, K key dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


def with_learned_angles(x_BTHK: Tensor, theta_HK: Tensor, seq: SequenceInfo) -> Tensor:
    """Queries or keys times cosine and sine of their angles, one behind the other: [B, T, H, 2 K].

    Args:
        x_BTHK: queries or keys under their feature map.
        theta_HK: radians per token.
        seq: positions of the tokens in their documents.

    >>> x = torch.ones(1, 2, 1, 1)
    >>> with_learned_angles(x, torch.full((1, 1), torch.pi / 2), SequenceInfo.make(1, 2, x.device))[0, :, 0].round()
    tensor([[1., 0.],
            [-0., 1.]])
    """
    angle_BTHK = seq.positions_BT[..., None, None].to(wide(theta_HK).dtype) * wide(theta_HK)
    return torch.cat([x_BTHK * angle_BTHK.cos(), x_BTHK * angle_BTHK.sin()], -1).to(x_BTHK.dtype)


def published_angles(heads: int, dim: int) -> Tensor:
    """The angles [H, K] at the start: 10000^(-2 i / (H K)), i counting the dims of all heads.

    >>> published_angles(2, 2).tolist()
    [[1.0, 0.009999999776482582], [9.999999747378752e-05, 9.999999974752427e-07]]
    """
    return 10000.0 ** (-2.0 * torch.arange(heads * dim, dtype=torch.float32) / (heads * dim)).view(heads, dim)
