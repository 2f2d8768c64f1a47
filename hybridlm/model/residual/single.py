"""One residual stream h [B, T, D], the form of nearly all models: every branch adds to it.

B rows, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridlm.model.layer_context import LayerContext
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.residual.contract import BranchName, Residual, ResidualBranch, ResidualConfig, register_residual


@dataclass(kw_only=True)
class SingleResidualConfig(ResidualConfig):
    """One stream; the option `residual` of each mixer and feed-forward says how its branch is normed and scaled."""

    form: str = "single"


class SingleResidualBranch(ResidualBranch):
    """Adds a branch to the stream in one of the forms of `BranchConfig`. It has no parameters."""

    def __init__(self, config: ResidualConfig, branch: BranchConfig, context: LayerContext, name: BranchName):
        super().__init__(config, branch, context, name)
        self.form = branch.form
        self.alpha = branch.alpha

    def read(self, stream: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        if self.form == "post":
            return stream, stream
        x_BTD = norm(stream)
        return x_BTD, x_BTD if self.form == "normed" else stream

    def write(self, kept: Tensor, output_BTD: Tensor, norm: RMSNorm) -> Tensor:
        y_BTD = norm(output_BTD) if self.form == "post" else output_BTD
        h_BTD = kept if self.alpha == 1.0 else self.alpha * kept
        return h_BTD + self.scaled(y_BTD)

    def extra_repr(self) -> str:
        return f"{self.form}, alpha={self.alpha}, beta={self.beta}"


@register_residual("single", SingleResidualConfig)
class SingleResidual(Residual):
    """A stream that is the embedding at the start and the input of the final norm at the end."""

    branch = SingleResidualBranch

    def start(self, embedding_BTD: Tensor) -> Tensor:
        return embedding_BTD

    def end(self, stream: Tensor) -> Tensor:
        return stream
