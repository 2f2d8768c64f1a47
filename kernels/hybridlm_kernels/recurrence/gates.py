"""Forget gates, from the raw output of a projection to the logarithm of the decay, and sigmoid write strengths.

    softplus       g = -e^{A_log} softplus(u + dt_bias)                    (Mamba-2, Gated DeltaNet, KDA)
    lower_bounded  g = lower_bound * sigmoid(e^{A_log} (u + dt_bias))      (GLM-5.3, Ling 3.0)
    logsigmoid     g = logsigmoid(u + dt_bias) / normalizer                (GLA)

The operations take u and a `Gate`, so that a kernel can compute g where it is used and never store it.

Legend: B rows, T tokens per row, HV value heads, K key head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.precision import wide


@dataclass(frozen=True, eq=False)
class Gate:
    """A forget gate with its parameters.

    Args:
        kind: the form of the gate, as above.
        A_log: [HV], logarithm of the rate, for softplus and lower_bounded; None for logsigmoid.
        dt_bias: added to the raw gate, [HV] for a scalar decay, [HV, K] for a decay per channel; None is zero.
        lower_bound: smallest g of lower_bounded, below 0.
        normalizer: divisor of logsigmoid, above 0.

    Raises:
        ValueError: the kind is unknown, A_log is missing or has no place in it, or a bound or normalizer is out of
            range.

    >>> import torch
    >>> Gate("logsigmoid").log_decay(torch.zeros(1, 1, 1)).exp()  # half of the state is kept
    tensor([[[0.5000]]])
    """

    kind: Literal["softplus", "lower_bounded", "logsigmoid"]
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    lower_bound: float = -5.0
    normalizer: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("softplus", "lower_bounded", "logsigmoid"):
            raise ValueError(f"gate: kind must be softplus, lower_bounded or logsigmoid; got {self.kind!r}")
        if (self.A_log is None) != (self.kind == "logsigmoid"):
            raise ValueError(f"gate: {self.kind} " + ("needs A_log" if self.A_log is None else "has no A_log"))
        if self.lower_bound >= 0 or self.normalizer <= 0:
            raise ValueError("gate: lower_bound must be below 0 and normalizer above; "
                             f"got {self.lower_bound} and {self.normalizer}")

    def check(self, name: str, u: Tensor) -> None:
        """Raise ValueError unless the parameters fit u, [B, T, HV] or [B, T, HV, K]."""
        if u.dim() < 3:
            raise ValueError(f"{name}: a gate needs g for every token; got shape {list(u.shape)}")
        for label, x, shape in (("A_log", self.A_log, u.shape[2:3]), ("dt_bias", self.dt_bias, u.shape[2:])):
            if x is not None and x.shape != shape:
                raise ValueError(f"{name}: the gate's {label} must be {list(shape)}; got {list(x.shape)}")

    def step(self, u: Tensor) -> Tensor:
        """The biased gate u + dt_bias, in float32 at least."""
        u = wide(u)
        return u if self.dt_bias is None else u + self.dt_bias.to(u.dtype)

    def inverse(self, rate_H: Tensor) -> Tensor:
        """The biased gate at which the logarithm of the decay of each head is -rate.

        Args:
            rate_H: positive rates [HV]; those beyond a lower bound become 0.999 of it.

        >>> gate = Gate("softplus", A_log=torch.zeros(1))
        >>> gate.log_decay(gate.inverse(torch.tensor([0.25]))[None, None]).tolist()
        [[[-0.25]]]
        """
        rate_H = wide(rate_H)
        if self.A_log is None:
            return -torch.log(torch.expm1(rate_H * self.normalizer))
        scale_H = self.A_log.to(rate_H.dtype).exp()
        if self.kind == "softplus":
            return torch.log(torch.expm1(rate_H / scale_H))
        return torch.logit((rate_H / -self.lower_bound).clamp(max=0.999)) / scale_H

    def log_decay(self, u: Tensor) -> Tensor:
        """The logarithm of the decay, in the shape of the raw gate u and in float32 at least."""
        u = self.step(u)
        if self.A_log is None:
            return F.logsigmoid(u) / self.normalizer
        rate = self.A_log.to(u.dtype).exp()
        rate = rate if u.dim() == 3 else rate[:, None]
        if self.kind == "softplus":
            return F.softplus(u) * -rate
        return self.lower_bound * torch.sigmoid(u * rate)


def parameters_of(gate: Gate | None) -> tuple[Tensor | None, Tensor | None]:
    """A_log and dt_bias of the gate, None where there is none."""
    return (None, None) if gate is None else (gate.A_log, gate.dt_bias)


def log_decay(g: Tensor | None, gate: Gate | None) -> Tensor | None:
    """The logarithm of the decay that an operation's `g` and `gate` stand for, differentiable."""
    return g if g is None or gate is None else gate.log_decay(g)


def write_strength(beta: Tensor | None, sigmoid_scale: float | None) -> Tensor | None:
    """The write strength that an operation's `beta` and `beta_sigmoid` stand for, differentiable.

    With a `sigmoid_scale` it is sigmoid_scale * sigmoid(beta), in float32 at least.
    """
    if beta is None or sigmoid_scale is None:
        return beta
    strength = torch.sigmoid(wide(beta))
    return strength if sigmoid_scale == 1 else strength * sigmoid_scale
