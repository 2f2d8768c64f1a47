"""The gated activation of feed-forwards and experts: SwiGLU, or SiTU, which caps both of its factors by tanh.

Source of SiTU: Kimi K3, 2026, whose caps are the default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from hybridlm.errors import require
from hybridlm_kernels import SoftCaps

Activation = Literal["swiglu", "situ"]
SITU_CAPS = (4.0, 25.0)  # those of Kimi K3


def soft_caps_of(activation: Activation, caps: Sequence[float | None]) -> SoftCaps | None:
    """Caps of SiTU as operations take them; None for SwiGLU."""
    return SoftCaps(caps[0], caps[1]) if activation == "situ" and caps[0] is not None else None


def check_situ(activation: Activation, caps: Sequence[float | None], limit: float | None) -> None:
    """Raise ConfigError unless `caps` are those of SiTU, which stand without a limit of SwiGLU."""
    usable = all(cap is None or (cap > 0 and math.isfinite(cap)) for cap in caps)
    require(len(caps) == 2 and caps[0] is not None and usable, "situ_caps",
            "must be a cap of the gate and one of the up projection", got=list(caps),
            expected="finite numbers above 0, as in [4.0, 25.0]",
            hint="null for the second one leaves the up projection as it is")
    require(activation == "situ" or tuple(caps) == SITU_CAPS, "situ_caps", f"are not used by {activation}",
            got=list(caps), expected=f"{list(SITU_CAPS)}, or activation=situ")
    require(activation == "swiglu" or limit is None, "swiglu_limit", "is not used by situ, which has caps of its own",
            got=limit, expected="null", hint="situ_caps says which")
