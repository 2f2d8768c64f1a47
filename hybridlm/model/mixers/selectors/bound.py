"""Blocks by an upper bound of the product of a query with any of their keys.

    s_tj = sum_c max(q_tc max_s k_sc, q_tc min_s k_sc)          s over the block, c over the dims

Source: Tang et al. 2024, Quest, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridlm.model.mixers.common.block_selection import register_selector
from hybridlm.model.mixers.selectors.key_summary import KeySummary, KeySummaryConfig


@dataclass(kw_only=True)
class BoundSelectorConfig(KeySummaryConfig):
    """Configuration of the selection by bounds; Quest has a list per query head."""

    kind: str = "bound"
    keys_per_entry: ClassVar[int] = 2


@register_selector("bound", BoundSelectorConfig)
class BoundSelector(KeySummary):
    """The module; it has no parameters. An entry is the largest and the smallest key, dim by dim."""

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        return torch.cat([features_BEL.amax(2), features_BEL.amin(2)], -1)

    def query_parts(self, q_BQGRK: Tensor) -> Tensor:
        return torch.cat([q_BQGRK.clamp(min=0), q_BQGRK.clamp(max=0)], -1)
