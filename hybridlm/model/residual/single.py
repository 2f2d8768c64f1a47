"""One residual stream h [B, T, D], the form of nearly all models: every branch adds to it.

The output of a branch that is aside goes to the next branch alone; until then the stream is the pair (h, output).
B rows, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridlm.model.layer_context import LayerContext
from hybridlm.model.norm import RMSNorm
from hybridlm.model.residual.branch import BranchConfig
from hybridlm.model.residual.contract import (
    BranchName,
    Residual,
    ResidualBranch,
    ResidualConfig,
    Stream,
    register_residual,
)


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

    def read(self, stream: Stream, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        h_BTD = input_BTD = stream
        if isinstance(stream, tuple):
            h_BTD, aside_BTD = stream
            input_BTD = aside_BTD if self.form == "aside" else h_BTD + aside_BTD
        if self.form == "post":
            return input_BTD, h_BTD
        x_BTD = norm(input_BTD)
        return x_BTD, x_BTD if self.form == "normed" else h_BTD

    def write(self, kept: Tensor, output_BTD: Tensor, norm: RMSNorm) -> Stream:
        if self.form == "aside":
            return kept, self.scaled(output_BTD)
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

    def end(self, stream: Stream) -> Tensor:
        return stream[0] if isinstance(stream, tuple) else stream
