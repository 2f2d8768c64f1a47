"""Parts of residuals with several streams X [B, T, M, D]: config, map to coefficients, mixing of streams.

A branch reads one hidden state from the streams, writes its output to each of them, and may mix them:

    x = sum_i read_i X_i          X'_j = sum_i carry_ij X_i + write_j f(norm(x))

Coefficients and sums are computed in fp32, also under autocast; streams keep the dtype of the embedding.
B rows, T tokens, M streams, D model width, C coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.parameter_roles import ParameterRole, find_roles, matrix_role
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.residual.contract import FP32_BYTES, BranchName, Residual, ResidualConfig
from hybridlm.plain_data import to_dict
from hybridlm_kernels.precision import wide


def check_plain_branch(branch: BranchConfig, form: str) -> None:
    """Refuse a branch whose norm does not stand before it, or a factor on the stream.

    Raises:
        ConfigError: it has such options.
    """
    plain = BranchConfig(beta=branch.beta)
    require(branch == plain, "residual", f"is for model.residual.form=single, not for {form}", got=to_dict(branch),
            expected=to_dict(plain))


@dataclass(kw_only=True)
class StreamsConfig(ResidualConfig):
    """Base of the configs of residuals with several streams.

    Args:
        num_streams: streams M; checkpointing keeps M hidden states per layer.
    """

    num_streams: int = 4

    def __post_init__(self) -> None:
        require(self.num_streams >= 1, "num_streams", "must be positive", got=self.num_streams)

    def check_branch(self, branch: BranchConfig) -> None:
        check_plain_branch(branch, self.form)

    def stream_bytes(self, context: LayerContext) -> float:
        return self.num_streams * super().stream_bytes(context)

    def activation_bytes(self, context: LayerContext, element_bytes: int, branch: BranchName) -> float:
        """The streams, what is read of them before its norm, the normed input, and the branch's output in fp32."""
        return self.stream_bytes(context) + (2 * FP32_BYTES + element_bytes) * context.hidden_size

    def map_params(self, context: LayerContext, groups: int, coefficients: int) -> int:
        """Number of parameters of a `StreamMap`."""
        return coefficients * (self.num_streams * context.hidden_size + 1) + groups

    def map_flops(self, context: LayerContext, coefficients: int) -> float:
        """FLOPs per token of a `StreamMap`."""
        return 2.0 * coefficients * self.num_streams * context.hidden_size

    def mixing_flops(self, context: LayerContext, results: int) -> float:
        """FLOPs per token of weighted sums of all streams into `results` hidden states."""
        return 2.0 * results * self.num_streams * context.hidden_size


def stream_mixing_role(weight: Tensor) -> ParameterRole:
    """Find the role of a matrix from which coefficients are computed."""
    rows, columns = weight.shape
    return matrix_role(rows, columns, "stream_mixing")


class StreamMap(KeepsFP32):
    """Coefficients of each token from all of its streams: scale * (W x_hat) + base, x_hat = x / rms(x).

    x are the streams in one row [M D]. Groups of coefficients have a scale each.

    Args:
        streams: streams M.
        width: model width D.
        sizes: number of coefficients of each group.
        eps: added to the mean square of x.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("weight", "base", "scale")

    def __init__(self, streams: int, width: int, sizes: Sequence[int], eps: float):
        super().__init__()
        self.sizes = tuple(sizes)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(sum(sizes), streams * width))
        self.base = nn.Parameter(torch.empty(sum(sizes)))
        self.scale = nn.Parameter(torch.empty(len(sizes)))

    def forward(self, streams_BTMD: Tensor) -> tuple[Tensor, ...]:
        """Compute the groups of coefficients, [B, T, size] each, in fp32."""
        x_BTX = wide(streams_BTMD).flatten(-2)
        with torch.autocast(x_BTX.device.type, enabled=False):
            product_BTC = F.linear(x_BTX, self.weight.to(x_BTX.dtype))
        product_BTC = product_BTC * torch.rsqrt(x_BTX.square().mean(-1, keepdim=True) + self.eps)
        groups = zip(product_BTC.split(self.sizes, -1), self.scale.unbind(), self.base.split(self.sizes), strict=True)
        return tuple(scale * product + base for product, scale, base in groups)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"weight": stream_mixing_role(self.weight)})

    def init_weights(self, std: float, scale: float) -> None:
        """Random weights, bases of zero, and all scales equal to `scale`."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.base)
        nn.init.constant_(self.scale, scale)


class StreamsResidual(Residual):
    """All streams begin as the embedding."""

    def __init__(self, config: StreamsConfig, context: LayerContext):
        super().__init__(config, context)
        self.num_streams = config.num_streams

    def start(self, embedding_BTD: Tensor) -> Tensor:
        return embedding_BTD[..., None, :].expand(-1, -1, self.num_streams, -1)
