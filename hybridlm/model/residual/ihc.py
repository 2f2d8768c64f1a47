"""Independent hyper-connections (iHC): streams that branches read and write, and that are not mixed.

    read_i = sigmoid(r_i) + eps     write_j = 2 sigmoid(w_j) + eps
    x = sum_i read_i X_i            X'_j = X_j + write_j f(norm(x))

Source: Hy4 in transformers (`HYV4HyperConnection`).
M streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hybridlm.model.residual.bounded import BoundedBranch, EndedStreams, EndedStreamsConfig
from hybridlm.model.residual.contract import register_residual


@dataclass(kw_only=True)
class IHCConfig(EndedStreamsConfig):
    """Configuration of hyper-connections whose streams are not mixed.

    Args:
        num_streams: streams M.
        eps: added to read and write weights.
        initial_scale: of the part of the logits that depends on the token.
        end: input of the final norm: `learned` (Hy4), `mean` or `sum` of the streams.
    """

    form: str = "ihc"

    def initial_read_logit(self) -> float:
        """Read weights sum to 1 at first: sigmoid(-log(M - 1)) = 1 / M."""
        return -math.log(max(self.num_streams - 1, 1))


class IHCBranch(BoundedBranch):
    """Leaves the streams as they are, but for what is written to them."""

    def weights(self, streams_BTMD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        read_BTM, write_BTM = self.coefficients(streams_BTMD)
        return read_BTM.sigmoid() + self.config.eps, 2.0 * write_BTM.sigmoid() + self.config.eps, None


@register_residual("ihc", IHCConfig)
class IndependentHyperConnections(EndedStreams):
    """The streams of iHC."""

    branch = IHCBranch
