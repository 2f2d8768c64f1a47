"""Parts of mHC and iHC: hyper-connections whose weights are bounded.

All coefficients come from one map of all streams together (`StreamMap`), with logits r, w and C:

    read    sigmoid(r) + eps            x = sum_i read_i X_i
    write   2 sigmoid(w)                X'_j = sum_i carry_ij X_i + write_j f(norm(x))
    carry   from C, or the identity

B rows, T tokens, M streams, D model width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.residual.contract import BranchName, ResidualBranch
from hybridlm.model.residual.streams import StreamMap, StreamsConfig, StreamsResidual
from hybridlm_kernels import read_streams, write_streams
from hybridlm_kernels.precision import wide

End = Literal["learned", "mean", "sum"]


@dataclass(kw_only=True)
class BoundedStreamsConfig(StreamsConfig):
    """Base of the configs of bounded hyper-connections.

    Args:
        num_streams: streams M.
        eps: added to read weights.
        initial_scale: of the part of the logits that depends on the token.
    """

    eps: float = 1e-6
    initial_scale: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eps >= 0, "eps", "must not be negative", got=self.eps)
        require(self.initial_scale > 0, "initial_scale", "must be positive", got=self.initial_scale)

    def carry_logits(self) -> int:
        """Number of logits from which the carry matrix is computed; 0 where streams are not mixed."""
        return 0

    def logit_groups(self) -> Sequence[int]:
        """Number of logits for reading, for writing, and for mixing where streams are mixed."""
        carry = self.carry_logits()
        return (self.num_streams, self.num_streams, *([carry] if carry else []))

    def initial_read_logit(self) -> float:
        """Logit of each read weight at first, apart from what depends on the token."""
        return 0.0

    def branch_params(self, context: LayerContext, branch: BranchName) -> int:
        groups = self.logit_groups()
        return self.map_params(context, len(groups), sum(groups))

    def flops_per_token(self, context: LayerContext, branch: BranchName) -> float:
        results = 2 + (self.num_streams if self.carry_logits() else 0)
        return self.map_flops(context, sum(self.logit_groups())) + self.mixing_flops(context, results)


@dataclass(kw_only=True)
class EndedStreamsConfig(BoundedStreamsConfig):
    """Base of the configs whose end is chosen.

    Args:
        num_streams: streams M.
        eps: added to read weights.
        initial_scale: of the part of the logits that depends on the token.
        end: input of the final norm: `learned` reads the streams as a branch does; `mean` or `sum` of the streams.
    """

    end: End = "learned"

    def num_params(self, context: LayerContext) -> int:
        return self.map_params(context, 1, self.num_streams) if self.end == "learned" else 0

    def end_flops_per_token(self, context: LayerContext) -> float:
        if self.end != "learned":
            return 0.0
        return self.map_flops(context, self.num_streams) + self.mixing_flops(context, 1)


class BoundedBranch(ResidualBranch):
    """Reads, mixes and writes all streams around one branch. Parameters: `coefficients`."""

    def __init__(self, config: BoundedStreamsConfig, branch: BranchConfig, context: LayerContext, name: BranchName):
        super().__init__(config, branch, context, name)
        self.config = config
        self.coefficients = StreamMap(config.num_streams, context.hidden_size, config.logit_groups(),
                                      context.norm.eps)

    @abstractmethod
    def weights(self, streams_BTMD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute read weights [B, T, M], write weights [B, T, M] and carry weights [B, T, M, M], in fp32.

        Carry weights None stand for the identity.
        """

    def read(self, stream: Any, norm: RMSNorm) -> tuple[Tensor, Any]:
        read_BTM, write_BTM, carry_BTMM = self.weights(stream)
        return norm(read_streams(stream, read_BTM)), (stream, carry_BTMM, write_BTM)

    def write(self, kept: Any, output_BTD: Tensor, norm: RMSNorm) -> Any:
        streams_BTMD, carry_BTMM, write_BTM = kept
        return write_streams(streams_BTMD, carry_BTMM, write_BTM, self.scaled(output_BTD))

    def init_weights(self, std: float) -> None:
        config = self.config
        self.coefficients.init_weights(std, config.initial_scale)
        nn.init.constant_(self.coefficients.base[: config.num_streams], config.initial_read_logit())


class EndedStreams(StreamsResidual):
    """Ends the streams by the option `end`. Parameters: `end_coefficients` where it is `learned`."""

    def __init__(self, config: EndedStreamsConfig, context: LayerContext):
        super().__init__(config, context)
        self.config = config
        self.end_coefficients = None
        if config.end == "learned":
            self.end_coefficients = StreamMap(config.num_streams, context.hidden_size, [config.num_streams],
                                              context.norm.eps)

    def end(self, stream: Tensor) -> Tensor:
        if self.end_coefficients is not None:
            return read_streams(stream, self.end_coefficients(stream)[0].sigmoid() + self.config.eps)
        total_BTD = wide(stream).sum(-2)
        return (total_BTD if self.config.end == "sum" else total_BTD / self.num_streams).to(stream.dtype)

    def init_weights(self, std: float) -> None:
        if self.end_coefficients is not None:
            self.end_coefficients.init_weights(std, self.config.initial_scale)
            nn.init.constant_(self.end_coefficients.base, self.config.initial_read_logit())
