"""Configuration that kinds of softmax attention share: query heads in groups that share one key/value head each.

Source: Ainslie et al. 2023 (GQA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from hybridlm.errors import require
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers.common.dense_attention import check_heads
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.sizing import HeadSizes, ModelSizes


@dataclass(kw_only=True)
class GroupedHeadsConfig(MixerConfig):
    """Heads of softmax attention.

    Args:
        num_heads: query heads H.
        head_dim: dims per head K.
        num_kv_heads: key/value heads G; null is `num_heads`.

    Raises:
        ConfigError: numbers that are not positive, or groups of unlike size.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "kv_heads"):
            require(getattr(self, key) > 0, key.replace("kv_heads", "num_kv_heads"), "must be positive",
                    got=getattr(self, key))
        require(self.num_heads % self.kv_heads == 0, "num_kv_heads", "must divide num_heads", got=self.num_kv_heads,
                expected=f"a divisor of {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def check_window(self, window: int | None) -> None:
        """Raise ConfigError unless a window is a positive number of keys, or null."""
        require(window is None or window > 0, "window", "must be positive", got=window,
                hint="null sees all earlier tokens")

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_heads(self.num_heads, shards)

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        return super().canonical(norm) | {"num_kv_heads": self.kv_heads}

    def head_sizes(self) -> HeadSizes:
        return HeadSizes(self.num_heads, self.head_dim, self.num_kv_heads)

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        heads = model.heads_for(cls)
        sizes = {"num_heads": heads.num_heads, "head_dim": heads.head_dim}
        return sizes if "num_heads" in options else sizes | {"num_kv_heads": heads.num_kv_heads}

    def state_heads(self) -> int:
        return self.kv_heads

    def with_state_heads(self, count: int) -> Self:
        per_group = self.num_heads // self.kv_heads
        return replace(self, num_heads=count * per_group, num_kv_heads=None if self.num_kv_heads is None else count)

    def projection_heads(self) -> dict[str, tuple[int, int]]:
        queries, keys = (self.num_heads, self.head_dim), (self.kv_heads, self.head_dim)
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
