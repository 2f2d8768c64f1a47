"""The gated activation of feed-forwards and experts: SwiGLU; SiTU, which caps both of its factors by tanh; GeGLU.

Sources: Shazeer 2020 (GLU variants improve transformer) for SwiGLU and GeGLU; Kimi K3, 2026, for SiTU and its caps,
which are the default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.errors import require
from hybridlm_kernels import SoftCaps
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

Activation = Literal["swiglu", "situ"]
DenseActivation = Literal["swiglu", "situ", "geglu", "geglu_tanh"]
SITU_CAPS = (4.0, 25.0)  # those of Kimi K3


def geglu(gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
    """Multiply gelu(gate) by up, in fp32 at least inside; the backward keeps these two alone.

    Args:
        gate: any shape.
        up: the same shape.
        tanh: gelu by its approximation with tanh, as Gemma's, rather than by the error function.

    Returns:
        The products in the dtype of `gate`.

    >>> geglu(torch.tensor([0.0, 10.0]), torch.tensor([3.0, 2.0]), tanh=True).tolist()
    [0.0, 20.0]
    """

    def multiply(gate: Tensor, up: Tensor) -> Tensor:
        return (F.gelu(wide(gate), approximate="tanh" if tanh else "none") * wide(up)).to(gate.dtype)

    return multiply(gate, up) if torch.compiler.is_dynamo_compiling() else recomputed(multiply, gate, up)


def soft_caps_of(activation: DenseActivation, caps: Sequence[float | None]) -> SoftCaps | None:
    """Caps of SiTU as operations take them; None for SwiGLU."""
    return SoftCaps(caps[0], caps[1]) if activation == "situ" and caps[0] is not None else None


def check_situ(activation: DenseActivation, caps: Sequence[float | None], limit: float | None) -> None:
    """Raise ConfigError unless `caps` are those of SiTU, which stand without a limit of SwiGLU."""
    usable = all(cap is None or (cap > 0 and math.isfinite(cap)) for cap in caps)
    require(len(caps) == 2 and caps[0] is not None and usable, "situ_caps",
            "must be a cap of the gate and one of the up projection", got=list(caps),
            expected="finite numbers above 0, as in [4.0, 25.0]",
            hint="null for the second one leaves the up projection as it is")
    require(activation == "situ" or tuple(caps) == SITU_CAPS, "situ_caps", f"are not used by {activation}",
            got=list(caps), expected=f"{list(SITU_CAPS)}, or activation=situ")
    require(activation != "situ" or limit is None, "swiglu_limit", "is not used by situ, which has caps of its own",
            got=limit, expected="null", hint="situ_caps says which")
    require(activation in ("swiglu", "situ") or limit is None, "swiglu_limit", f"is not used by {activation}",
            got=limit, expected="null, or activation=swiglu")
