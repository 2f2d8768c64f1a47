"""Configuration that mixers share whose decode state has one matrix per head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from hybridlm.model.mixers.contract import MixerConfig


@dataclass(kw_only=True)
class StateHeadsConfig(MixerConfig):
    """Base of configs with heads that each keep a state of fixed size, so that a sweep can match states by heads.

    Args:
        num_heads: heads H.
    """

    num_heads: int
    is_linear: ClassVar[bool] = True

    def state_heads(self) -> int:
        return self.num_heads

    def with_state_heads(self, count: int) -> Self:
        return replace(self, num_heads=count)
