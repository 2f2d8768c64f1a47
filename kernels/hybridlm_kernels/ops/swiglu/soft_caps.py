"""The caps of SiTU, which bound both factors of SwiGLU by tanh."""

from __future__ import annotations

from dataclasses import dataclass

from hybridlm_kernels.registry import Call


@dataclass(frozen=True)
class SoftCaps:
    """Caps a and b of SiTU: a tanh(gate / a) sigmoid(gate) * b tanh(up / b).

    Args:
        gate: the cap a of the gate.
        up: the cap b of the up projection; None leaves it as it is.

    Raises:
        ValueError: a cap that is not positive.
    """

    gate: float
    up: float | None

    def __post_init__(self) -> None:
        if self.gate <= 0 or (self.up is not None and self.up <= 0):
            raise ValueError(f"soft caps must be positive; got {self.gate} and {self.up}")


def no_soft_caps(call: Call) -> tuple[bool, str]:
    """Refuses soft caps, for a backend that does not know them."""
    return (False, "has no soft caps (SiTU)") if call.get("soft_caps") else (True, "")
