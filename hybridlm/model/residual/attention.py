"""Attention residuals in blocks: a branch reads a softmax-weighted sum over depth instead of one running sum.

    x = sum_i softmax_i(q . v_i / rms(v_i)) v_i

The sources v_i are the embedding, the sum of each finished block of layers, and the running sum of the open block.
Every branch has its own query q [D], zero at first, so that it begins with the mean of its sources. The mixer of a
block's first layer reads before the block begins; the running sum starts again with its output.

Source: Attention Residuals (arXiv 2603.15031); Kimi K3.
B rows, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.residual.contract import (
    BRANCH_NAMES,
    FP32_BYTES,
    BranchName,
    Residual,
    ResidualBranch,
    ResidualConfig,
    register_residual,
)
from hybridlm.model.residual.streams import check_plain_branch
from hybridlm_kernels import depth_attention
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class AttentionResidualConfig(ResidualConfig):
    """Configuration of attention residuals.

    Args:
        block_layers: layers per block; 1 keeps the sum of every layer, and memory then grows with depth.
    """

    form: str = "attention"
    block_layers: int = 12

    def __post_init__(self) -> None:
        require(self.block_layers >= 1, "block_layers", "must be positive", got=self.block_layers)

    def check_branch(self, branch: BranchConfig) -> None:
        check_plain_branch(branch, self.form)

    def check_present(self, branches: tuple[BranchName, ...]) -> None:
        require(branches == BRANCH_NAMES, "residual.form", "needs a mixer and a feed-forward in each layer",
                got=self.form, expected="another form where layers have one branch alone")

    def check_runs(self) -> None:
        raise ConfigError("residual.form", "needs layers that run once, which the number of its sources follows",
                          got=self.form, expected="another form where schedule.reuse or schedule.repeat is set")

    def begins_block(self, layer_index: int, branch: BranchName) -> bool:
        """Whether the branch is the first one of a block."""
        return branch == "mixer" and layer_index % self.block_layers == 0

    def sources(self, layer_index: int, branch: BranchName) -> int:
        """Number of hidden states that the branch of a layer reads; the end of L layers reads as many as layer L."""
        finished = -(-layer_index // self.block_layers)  # the embedding is the first
        return finished + 1 if branch == "mixer" else layer_index // self.block_layers + 2

    def num_params(self, context: LayerContext) -> int:
        return context.hidden_size

    def branch_params(self, context: LayerContext, branch: BranchName) -> int:
        return context.hidden_size if self.sources(context.layer_index, branch) > 1 else 0

    def flops_per_token(self, context: LayerContext, branch: BranchName) -> float:
        return self._read_flops(context, self.sources(context.layer_index, branch))

    def end_flops_per_token(self, context: LayerContext) -> float:
        return self._read_flops(context, self.sources(context.num_layers, "mixer"))

    def _read_flops(self, context: LayerContext, sources: int) -> float:
        """A score and a weighted sum over each source; one source is read as it is."""
        return 4.0 * sources * context.hidden_size if sources > 1 else 0.0

    def activation_bytes(self, context: LayerContext, element_bytes: int, branch: BranchName) -> float:
        """The running sum, what is read before its norm, and the normed input; finished blocks are kept once."""
        return self.stream_bytes(context) + (FP32_BYTES + element_bytes) * context.hidden_size


class DepthAttention(KeepsFP32):
    """Softmax attention of one learned query to the sources of each token. Parameters: `query` [D].

    >>> mean = DepthAttention(2, eps=1e-6)
    >>> _ = nn.init.zeros_(mean.query)
    >>> mean([torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 6.0]]])]).tolist()
    [[[2.0, 4.0]]]
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("query",)

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.query = nn.Parameter(torch.empty(width))

    def forward(self, sources: list[Tensor]) -> Tensor:
        """Mix sources [B, T, D] in fp32; the result has the dtype of the last one."""
        return depth_attention(self.query, sources, self.eps)


class AttentionResidualBranch(ResidualBranch):
    """Reads over depth. Parameters: `depth_attention`, but for the first branch, which has one source.

    A stream is the pair (sums of finished blocks, running sum), each a tensor [B, T, D].
    """

    def __init__(self, config: AttentionResidualConfig, branch: BranchConfig, context: LayerContext,
                 name: BranchName):
        super().__init__(config, branch, context, name)
        self.begins_block = config.begins_block(context.layer_index, name)
        self.depth_attention = None
        if config.sources(context.layer_index, name) > 1:
            self.depth_attention = DepthAttention(context.hidden_size, context.norm.eps)

    def read(self, stream: Any, norm: RMSNorm) -> tuple[Tensor, Any]:
        finished, running_BTD = stream
        mixed_BTD = running_BTD
        if self.depth_attention is not None:
            mixed_BTD = self.depth_attention([*finished, running_BTD])
        kept = ((*finished, running_BTD), None) if self.begins_block else stream
        return norm(mixed_BTD), (kept, running_BTD.dtype)

    def write(self, kept: Any, output_BTD: Tensor, norm: RMSNorm) -> Any:
        (finished, running_BTD), dtype = kept
        added_BTD = wide(self.scaled(output_BTD))
        total_BTD = added_BTD if running_BTD is None else wide(running_BTD) + added_BTD
        return finished, total_BTD.to(dtype)

    def init_weights(self, std: float) -> None:
        if self.depth_attention is not None:
            nn.init.zeros_(self.depth_attention.query)


@register_residual("attention", AttentionResidualConfig)
class AttentionResidual(Residual):
    """Begins with the embedding as running sum, and ends by a read of its own. Parameters: `depth_attention`."""

    branch = AttentionResidualBranch

    def __init__(self, config: AttentionResidualConfig, context: LayerContext):
        super().__init__(config, context)
        self.depth_attention = DepthAttention(context.hidden_size, context.norm.eps)

    def start(self, embedding_BTD: Tensor) -> Any:
        return (), embedding_BTD

    def end(self, stream: Any) -> Tensor:
        finished, running_BTD = stream
        return self.depth_attention([*finished, running_BTD])

    def init_weights(self, std: float) -> None:
        nn.init.zeros_(self.depth_attention.query)
