"""Gated reads: every channel of every stream has a gate of its own, from a map of low rank of all streams.

    n_i = norm(X_i)                                   weights per stream and channel
    x   = mean_i sigmoid(U silu(W n / M))_i * n_i     n: all streams in one row [M D]
    X'_j = X_j + 2 sigmoid(V n / M)_j f(x)

The branch has no other norm. The end reads like a branch, with parameters of its own.

Source: Qwen4's gated residual in transformers (`Qwen4ExpTextGatedResidual`).
B rows, T tokens, M streams, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.residual.contract import BranchName, ResidualBranch, ResidualConfig, register_residual
from hybridlm.model.residual.streams import StreamsConfig, StreamsResidual, stream_mixing_role
from hybridlm_kernels import rms_norm, write_streams
from hybridlm_kernels.precision import wide

CHANNELS_PER_RANK = 8  # the default rank is D / 8, as published


@dataclass(kw_only=True)
class GatedReadConfig(StreamsConfig):
    """Configuration of streams with gated reads.

    Args:
        num_streams: streams M.
        rank: rank of the map to the gates; null is an eighth of the model width.
    """

    form: str = "gated"
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank is None or self.rank > 0, "rank", "must be positive", got=self.rank)

    def rank_for(self, hidden_size: int) -> int:
        """Rank of the map to the gates in a model of this width."""
        return self.rank or max(1, hidden_size // CHANNELS_PER_RANK)

    def _read_params(self, context: LayerContext) -> int:
        return 2 * self.rank_for(context.hidden_size) * self.num_streams * context.hidden_size

    def num_params(self, context: LayerContext) -> int:
        return self._read_params(context) + self.norm_params(context)

    def norm_params(self, context: LayerContext) -> int:
        return self.num_streams * context.hidden_size

    def branch_params(self, context: LayerContext, branch: BranchName) -> int:
        return self._read_params(context) + self.num_streams**2 * context.hidden_size

    def flops_per_token(self, context: LayerContext, branch: BranchName) -> float:
        return 2.0 * self.branch_params(context, branch)

    def end_flops_per_token(self, context: LayerContext) -> float:
        return 2.0 * self._read_params(context)

    def activation_bytes(self, context: LayerContext, element_bytes: int, branch: BranchName) -> float:
        """The streams, their norms, the gates, and what enters and leaves the branch."""
        wide_tensors = 3 * self.stream_bytes(context) + 4 * context.hidden_size
        return wide_tensors + element_bytes * (2 * self.num_streams + 1) * context.hidden_size


class StreamRMSNorm(RMSNorm):
    """RMSNorm of each stream, with a weight per stream and channel.

    Args:
        streams: streams M.
        width: model width D.
        config: the model's norm.

    >>> StreamRMSNorm(2, 1, NormConfig(eps=1e-12))(torch.tensor([[4.0], [-3.0]])).flatten().tolist()
    [1.0, -1.0]
    """

    def __init__(self, streams: int, width: int, config: NormConfig):
        super().__init__(streams * width, config.eps, config.zero_centered)
        self.streams = streams

    def forward(self, x: Tensor) -> Tensor:
        """Normalise streams [..., M, D] over D."""
        weight_MD = self.weight.unflatten(0, (self.streams, -1))
        normed = rms_norm(wide(x), torch.ones_like(weight_MD[0]), self.eps)
        return (normed * (1.0 + weight_MD if self.zero_centered else weight_MD)).to(x.dtype)


class GatedRead(nn.Module):
    """Reads one hidden state from normed streams. Parameters: down_proj [rank, M D], up_proj [M D, rank]."""

    def __init__(self, config: GatedReadConfig, width: int):
        super().__init__()
        self.streams, rank = config.num_streams, config.rank_for(width)
        self.down_proj = nn.Linear(self.streams * width, rank, bias=False)
        self.up_proj = nn.Linear(rank, self.streams * width, bias=False)

    def forward(self, normed_BTMD: Tensor) -> Tensor:
        """Compute the hidden state [B, T, D]; the mean over streams is taken in fp32."""
        hidden = F.silu(self.down_proj(normed_BTMD.flatten(-2) / self.streams))
        gate_BTMD = self.up_proj(hidden).unflatten(-1, (self.streams, -1)).sigmoid()
        return (wide(gate_BTMD) * wide(normed_BTMD)).mean(-2).to(normed_BTMD.dtype)

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.down_proj.weight, std=std)
        nn.init.normal_(self.up_proj.weight, std=std)


class WriteGates(KeepsFP32):
    """Write weights of each token. Parameters: `weight` [M, M D]."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, streams: int, width: int):
        super().__init__()
        self.streams = streams
        self.weight = nn.Parameter(torch.empty(streams, streams * width))

    def forward(self, normed_BTMD: Tensor) -> Tensor:
        """Compute the weights [B, T, M], in fp32."""
        x_BTX = wide(normed_BTMD.flatten(-2)) / self.streams
        with torch.autocast(x_BTX.device.type, enabled=False):
            return 2.0 * F.linear(x_BTX, self.weight.to(x_BTX.dtype)).sigmoid()

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"weight": stream_mixing_role(self.weight)})


class GatedReadBranch(ResidualBranch):
    """Reads through gates and writes to every stream. Parameters: `gates` and `write_gates`."""

    def __init__(self, config: GatedReadConfig, branch: BranchConfig, context: LayerContext, name: BranchName):
        super().__init__(config, branch, context, name)
        self.gates = GatedRead(config, context.hidden_size)
        self.write_gates = WriteGates(config.num_streams, context.hidden_size)

    @classmethod
    def build_norm(cls, config: ResidualConfig, context: LayerContext) -> RMSNorm:
        assert isinstance(config, GatedReadConfig)
        return StreamRMSNorm(config.num_streams, context.hidden_size, context.norm)

    def read(self, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Any]:
        normed_BTMD = norm(stream)
        return self.gates(normed_BTMD), (stream, self.write_gates(normed_BTMD))

    def write(self, kept: Any, output_BTD: Tensor, norm: RMSNorm) -> Tensor:
        streams_BTMD, write_BTM = kept
        return write_streams(streams_BTMD, None, write_BTM, self.scaled(output_BTD))

    def init_weights(self, std: float) -> None:
        self.gates.init_weights(std)
        nn.init.normal_(self.write_gates.weight, std=std)


@register_residual("gated", GatedReadConfig)
class GatedStreams(StreamsResidual):
    """Ends by a gated read. Parameters: `end_norm` and `end_gates`."""

    branch = GatedReadBranch

    def __init__(self, config: GatedReadConfig, context: LayerContext):
        super().__init__(config, context)
        self.end_norm = StreamRMSNorm(config.num_streams, context.hidden_size, context.norm)
        self.end_gates = GatedRead(config, context.hidden_size)

    def end(self, stream: Tensor) -> Tensor:
        return self.end_gates(self.end_norm(stream))

    def init_weights(self, std: float) -> None:
        self.end_norm.reset_parameters()
        self.end_gates.init_weights(std)
