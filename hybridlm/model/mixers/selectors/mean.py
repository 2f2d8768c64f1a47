"""Blocks by the product of a query with the mean of their keys.

    s_tj = q_t . mean over the block of k_s

Source: Lu et al. 2025, MoBA, section 2.2, and its code (moba_naive.py): per query head, unscaled, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridlm.model.mixers.common.block_selection import register_selector
from hybridlm.model.mixers.selectors.key_summary import KeySummary, KeySummaryConfig
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class MeanSelectorConfig(KeySummaryConfig):
    """Configuration of the selection by mean keys; MoBA has a list per query head."""

    kind: str = "mean"


@register_selector("mean", MeanSelectorConfig)
class MeanSelector(KeySummary):
    """The module; it has no parameters."""

    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        return wide(features_BEL).mean(2).to(features_BEL.dtype)

    def query_parts(self, q_BQGRK: Tensor) -> Tensor:
        return q_BQGRK
