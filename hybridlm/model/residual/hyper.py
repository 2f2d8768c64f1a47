"""Hyper-connections: streams with learned read, write and carry weights, each with a part that depends on the token.

    [w, a, C] = static + scale * tanh(W x_hat_i)     per stream i: write weight w_i, read weight a_i, carry row C_i
    x = sum_i a_i X_i          X'_j = sum_i C_ij X_i + w_j f(norm(x))

x_hat_i = X_i / rms(X_i). At first W is 0, a is one-hot (another stream in each branch), C the identity and w is 1: the
model computes what one stream with norms before its branches would.

Source: Zhu et al. 2024 (Hyper-Connections, arXiv 2409.19606), sections 2 and 3.
B rows, T tokens, M streams, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.residual.contract import BRANCH_NAMES, BranchName, ResidualBranch, register_residual
from hybridlm.model.residual.streams import StreamsConfig, StreamsResidual, stream_mixing_role
from hybridlm_kernels import read_streams, write_streams
from hybridlm_kernels.precision import wide

INITIAL_SCALE = 0.01  # of the part that depends on the token


@dataclass(kw_only=True)
class HyperConfig(StreamsConfig):
    """Configuration of hyper-connections.

    Args:
        num_streams: streams M.
        dynamic: whether coefficients depend on the token; otherwise they are learned numbers.
    """

    form: str = "hyper"
    dynamic: bool = True

    def branch_params(self, context: LayerContext, branch: BranchName) -> int:
        coefficients = self.num_streams + 2
        return coefficients * (self.num_streams + self.dynamic * context.hidden_size) + 2 * self.dynamic

    def flops_per_token(self, context: LayerContext, branch: BranchName) -> float:
        streams = self.num_streams
        return self.map_flops(context, self.dynamic * (streams + 2)) + self.mixing_flops(context, streams + 2)


class HyperCoefficients(KeepsFP32):
    """Write, read and carry weights of each token: parameters `static` [M (M + 2)], and `weight` and `scale` by option.

    Args:
        config: the residual's config.
        width: model width D.
        eps: added to the mean square of a stream.
        first: the stream that is read at first.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("static", "weight", "scale")

    def __init__(self, config: HyperConfig, width: int, eps: float, first: int):
        super().__init__()
        self.streams, self.eps, self.first = config.num_streams, eps, first
        self.static = nn.Parameter(torch.empty(self.streams * (self.streams + 2)))
        self.weight = nn.Parameter(torch.empty(self.streams + 2, width)) if config.dynamic else None
        self.scale = nn.Parameter(torch.empty(2)) if config.dynamic else None

    def forward(self, streams_BTMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute write weights [B, T, M], read weights [B, T, M] and carry weights [B, T, M, M], in fp32."""
        coefficients = self.static.unflatten(0, (self.streams, -1)).expand(*streams_BTMD.shape[:2], -1, -1)
        if self.weight is not None and self.scale is not None:
            x_BTMD = wide(streams_BTMD)
            with torch.autocast(x_BTMD.device.type, enabled=False):
                product = F.linear(x_BTMD, self.weight.to(x_BTMD.dtype))
            product = product * torch.rsqrt(x_BTMD.square().mean(-1, keepdim=True) + self.eps)
            write_scale, other_scale = self.scale.unbind()
            scale = torch.cat([write_scale[None], other_scale.expand(self.streams + 1)])
            coefficients = coefficients + scale * product.tanh()
        write, read, carry = coefficients.split([1, 1, self.streams], -1)
        return write.squeeze(-1), read.squeeze(-1), carry

    def parameter_roles(self) -> dict[str, ParameterRole]:
        roles = {} if self.weight is None else {"weight": stream_mixing_role(self.weight)}
        return find_roles(self, roles)

    def init_weights(self) -> None:
        """Start as one stream would."""
        write = torch.ones(self.streams, 1)
        read = torch.zeros(self.streams, 1)
        read[self.first] = 1.0
        self.static.copy_(torch.cat([write, read, torch.eye(self.streams)], 1).flatten())
        if self.weight is not None and self.scale is not None:
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.scale, INITIAL_SCALE)


class HyperBranch(ResidualBranch):
    """Reads, mixes and writes all streams around one branch. Parameters: `coefficients`."""

    def __init__(self, config: HyperConfig, branch: BranchConfig, context: LayerContext, name: BranchName):
        super().__init__(config, branch, context, name)
        position = len(BRANCH_NAMES) * context.layer_index + BRANCH_NAMES.index(name)
        self.coefficients = HyperCoefficients(config, context.hidden_size, context.norm.eps,
                                              first=position % config.num_streams)

    def read(self, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Any]:
        write_BTM, read_BTM, carry_BTMM = self.coefficients(stream)
        return norm(read_streams(stream, read_BTM)), (stream, carry_BTMM, write_BTM)

    def write(self, kept: Any, output_BTD: Tensor, norm: RMSNorm) -> Tensor:
        streams_BTMD, carry_BTMM, write_BTM = kept
        return write_streams(streams_BTMD, carry_BTMM, write_BTM, self.scaled(output_BTD))

    def init_weights(self, std: float) -> None:
        self.coefficients.init_weights()


@register_residual("hyper", HyperConfig)
class HyperConnections(StreamsResidual):
    """The final norm gets the sum of the streams."""

    branch = HyperBranch

    def end(self, stream: Tensor) -> Tensor:
        return wide(stream).sum(-2).to(stream.dtype)
