"""Manifold-constrained hyper-connections (mHC): streams that are mixed by doubly stochastic matrices.

    read_i = sigmoid(r_i) + eps     write_j = 2 sigmoid(w_j)     carry = sinkhorn(softmax_j(C_ij) + eps)
    x = sum_i read_i X_i            X'_j = sum_i carry_ij X_i + write_j f(norm(x))

Rows and columns of `carry` sum to 1, so that mixing over any depth never amplifies. The single-pass form reads with
the weights that the branch before has computed from its own streams: writing one branch's output and reading the next
one's input then take one pass over the streams. Its first branch reads stream 0, its end has the last branch's
weights.

Sources: Xie et al. 2025 (mHC, arXiv 2512.24880); DeepSeek-V4 and GLM-5.3 in transformers (`mhc`); DeepSeek-V4.1
(`mhc_single_pass`).
B rows, T tokens, M streams, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybridlm.errors import require
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual.bounded import BoundedBranch, BoundedStreamsConfig, EndedStreams, EndedStreamsConfig
from hybridlm.model.residual.contract import FP32_BYTES, register_residual
from hybridlm.model.residual.streams import StreamsResidual
from hybridlm_kernels import read_streams, sinkhorn


@dataclass(kw_only=True)
class DoublyStochasticConfig(BoundedStreamsConfig):
    """Base of the configs whose carry matrix Sinkhorn makes doubly stochastic.

    Args:
        num_streams: streams M.
        eps: added to read weights, and in Sinkhorn to the matrix and to its sums.
        initial_scale: of the part of the logits that depends on the token.
        sinkhorn_iterations: how often the columns of the carry matrix are normalised.
    """

    sinkhorn_iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sinkhorn_iterations >= 1, "sinkhorn_iterations", "must be positive", got=self.sinkhorn_iterations)

    def carry_logits(self) -> int:
        return self.num_streams**2


@dataclass(kw_only=True)
class MHCConfig(DoublyStochasticConfig, EndedStreamsConfig):
    """Configuration of manifold-constrained hyper-connections.

    Args:
        num_streams: streams M.
        eps: added to read weights, and in Sinkhorn to the matrix and to its sums.
        initial_scale: of the part of the logits that depends on the token.
        sinkhorn_iterations: how often the columns of the carry matrix are normalised.
        end: input of the final norm: `learned` (DeepSeek-V4), `mean` (GLM-5.3) or `sum` of the streams.
    """

    form: str = "mhc"


@dataclass(kw_only=True)
class SinglePassMHCConfig(DoublyStochasticConfig):
    """Configuration of manifold-constrained hyper-connections in their single-pass form.

    Args:
        num_streams: streams M.
        eps: added to read weights, and in Sinkhorn to the matrix and to its sums.
        initial_scale: of the part of the logits that depends on the token.
        sinkhorn_iterations: how often the columns of the carry matrix are normalised.
    """

    form: str = "mhc_single_pass"

    def stream_bytes(self, context: LayerContext) -> float:
        return super().stream_bytes(context) + FP32_BYTES * self.num_streams

    def end_flops_per_token(self, context: LayerContext) -> float:
        return self.mixing_flops(context, 1)


class MHCBranch(BoundedBranch):
    """Mixes the streams by a doubly stochastic matrix of each token."""

    config: DoublyStochasticConfig

    def weights(self, streams_BTMD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        config = self.config
        read_BTM, write_BTM, carry_BTX = self.coefficients(streams_BTMD)
        carry_BTMM = carry_BTX.unflatten(-1, (config.num_streams, -1)).softmax(-1) + config.eps
        return (read_BTM.sigmoid() + config.eps, 2.0 * write_BTM.sigmoid(),
                sinkhorn(carry_BTMM, config.sinkhorn_iterations, config.eps))


@register_residual("mhc", MHCConfig)
class ManifoldHyperConnections(EndedStreams):
    """The streams of mHC."""

    branch = MHCBranch


class SinglePassBranch(MHCBranch):
    """Reads with the weights of the branch before. A stream is the pair (streams, read weights of the next branch)."""

    def read(self, stream: Any, norm: RMSNorm) -> tuple[Tensor, Any]:
        streams_BTMD, read_BTM = stream
        next_read_BTM, write_BTM, carry_BTMM = self.weights(streams_BTMD)
        return norm(_read(streams_BTMD, read_BTM)), (next_read_BTM, (streams_BTMD, carry_BTMM, write_BTM))

    def write(self, kept: Any, output_BTD: Tensor, norm: RMSNorm) -> Any:
        next_read_BTM, streams_and_weights = kept
        return super().write(streams_and_weights, output_BTD, norm), next_read_BTM


@register_residual("mhc_single_pass", SinglePassMHCConfig)
class SinglePassHyperConnections(StreamsResidual):
    """The streams of mHC in its single-pass form, without parameters of their own."""

    branch = SinglePassBranch

    def start(self, embedding_BTD: Tensor) -> Any:
        return super().start(embedding_BTD), None

    def end(self, stream: Any) -> Tensor:
        return _read(*stream)


def _read(streams_BTMD: Tensor, read_BTM: Tensor | None) -> Tensor:
    """Read the streams; without weights, before the first branch, stream 0."""
    return streams_BTMD[..., 0, :] if read_BTM is None else read_streams(streams_BTMD, read_BTM)
