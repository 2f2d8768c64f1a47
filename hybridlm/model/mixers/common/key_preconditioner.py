"""Preconditioner of the keys that a delta rule writes: channels that were written often are written less.

    A_t = e^{g_t} A_{t-1} + b_t k_t^2                       per key channel, g and b from x per head
    r = log(A_t + 1e-6) - c;   s = r / (1 + |r|);   the written key is k_t 1.5^{-s}

Source: Preconditioned DeltaNet, 2026 (curvature-aware sequence modeling for linear recurrences).
B rows, T tokens, D hidden size, H key heads, K key dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.decode_state import TensorState
from hybridlm.model.mixers.common.init import init_inverse_softplus, init_log_uniform
from hybridlm.model.mixers.common.scan import scan_tokens
from hybridlm.model.sequence import SequenceInfo

SQUASH = 1.5  # the largest factor, whose inverse is the smallest
EPSILON = 1e-6  # added to A
CENTER_INIT = -0.2


class KeyPreconditioner(nn.Module):
    """The factors of the written keys. Parameters: a_proj, b_proj [H, D]; A_log, dt_bias, center [H].

    Args:
        hidden_size: D.
        heads: key heads H.
        a_init: A_log starts as log U(low, high).
        dt_init: softplus(dt_bias) starts log-uniform in this range.

    A mixer that has one lists its vectors in `fp32_parameters`.
    """

    def __init__(self, hidden_size: int, heads: int, a_init: tuple[float, float], dt_init: tuple[float, float]):
        super().__init__()
        self.a_init, self.dt_init = a_init, dt_init
        self.a_proj, self.b_proj = (nn.Linear(hidden_size, heads, bias=False) for _ in range(2))
        self.A_log, self.dt_bias, self.center = (nn.Parameter(torch.zeros(heads)) for _ in range(3))

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor, seq: SequenceInfo, state: TensorState | None) -> Tensor:
        """The factors [B, T, H, K] of the written keys, in fp32 at least.

        Args:
            x_BTD: input of the mixer.
            k_BTHK: keys, normalised.
            seq: borders of the documents, and the shard of the rows held here.
            state: decode state of the scan of A.
        """
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        step_BTH = F.softplus(self.a_proj(x_BTD).to(wide) + self.dt_bias)
        decay_BTH = torch.exp(-self.A_log.exp() * step_BTH)
        squares_BTHK = self.b_proj(x_BTD).to(wide).sigmoid()[..., None] * k_BTHK.to(wide).square()
        decay_BTHK = decay_BTH[..., None].expand_as(squares_BTHK)
        A_BTC = scan_tokens(squares_BTHK.flatten(-2), decay_BTHK.flatten(-2), seq, state, "preconditioner")
        r_BTHK = (A_BTC.view_as(squares_BTHK) + EPSILON).log() - self.center[:, None]
        return torch.exp(-math.log(SQUASH) * r_BTHK / (1 + r_BTHK.abs()))

    def init_vectors(self) -> None:
        """Initialise everything but the projections, as published."""
        init_log_uniform(self.A_log, *self.a_init)
        init_inverse_softplus(self.dt_bias, *self.dt_init)
        nn.init.constant_(self.center, CENTER_INIT)
