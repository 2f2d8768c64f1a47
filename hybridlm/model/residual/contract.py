"""The contract of the residual stream: its config, its modules, and the registry of its forms.

A residual joins the branches of a model (mixers and feed-forwards) over all its layers. What flows from branch to
branch is its stream: one tensor [B, T, D] in the simplest form, several of them or a list of earlier outputs in others.
Only the residual and its branches look inside a stream; layers, activation checkpointing and multi-token prediction
pass it on. A stream is never changed in place, because activation checkpointing keeps those that layers start from.
B rows, T tokens, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from hybridlm.kind_registry import KindRegistry
from hybridlm.model.fp32_parameters import KeepsFP32
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.residual.branch import BranchConfig

Stream = Any  # [B, T, D] in the form `single`; a value that holds tensors in any form
BranchName = Literal["mixer", "feed_forward"]
BRANCH_NAMES: tuple[BranchName, ...] = ("mixer", "feed_forward")  # of a layer, in their order
FP32_BYTES = 4  # bytes per element of a stream, which stays in fp32 under bf16 autocast


@dataclass(kw_only=True)
class ResidualConfig:
    """Base of every residual's config, the option `model.residual`. Subclasses register a `form` with
    `@register_residual`.

    Costs are known from the config alone. The norm of each branch is the layer's and is counted there.
    """

    form: str

    def check_branch(self, branch: BranchConfig) -> None:
        """Raise ConfigError where this residual cannot join a branch with these options. By default it can."""

    def check_present(self, branches: tuple[BranchName, ...]) -> None:
        """Raise ConfigError where this residual cannot join a layer that has only these branches. By default it can."""

    def check_runs(self) -> None:
        """Raise ConfigError where this residual cannot join a layer that runs several times. By default it can."""

    def num_params(self, context: LayerContext) -> int:
        """Number of parameters of the residual itself, outside the layers."""
        return 0

    def branch_params(self, context: LayerContext, branch: BranchName) -> int:
        """Number of parameters of the residual for one branch of a layer, without the norm of the branch.

        Args:
            context: the layer; `context.layer_index` counts the layers of the residual's stream.
            branch: which of the layer's branches.
        """
        return 0

    def norm_params(self, context: LayerContext) -> int:
        """Number of weights of the norm of one branch, which `ResidualBranch.build_norm` makes."""
        return context.hidden_size

    def flops_per_token(self, context: LayerContext, branch: BranchName) -> float:
        """Forward FLOPs per token of the products for one branch of a layer; element-wise work is left out.

        Args:
            context: the layer, as for `branch_params`.
            branch: which of the layer's branches.
        """
        return 0.0

    def end_flops_per_token(self, context: LayerContext) -> float:
        """Forward FLOPs per token of ending a stream of `context.num_layers` layers."""
        return 0.0

    def stream_bytes(self, context: LayerContext) -> float:
        """Bytes per token of the stream before a layer: what activation checkpointing keeps of each."""
        return float(FP32_BYTES * context.hidden_size)

    def activation_bytes(self, context: LayerContext, element_bytes: int, branch: BranchName) -> float:
        """Bytes per token that one branch of a layer keeps for the backward pass, its norm included.

        By default the stream before it, and the normed input in the dtype of matrix products.

        Args:
            context: the layer, as for `branch_params`.
            element_bytes: bytes per element of an activation, 2 under bf16.
            branch: which of the layer's branches.
        """
        return self.stream_bytes(context) + element_bytes * context.hidden_size


class ResidualBranch(KeepsFP32, ABC):
    """Joins one branch of one layer to the stream. It may have parameters of its own.

    `fp32_parameters` are names of parameters, or their last parts, that stay in fp32 (`KeepsFP32`).

    Attributes:
        beta: factor of the branch's output, which `write` applies (`scaled`).
    """

    def __init__(self, config: ResidualConfig, branch: BranchConfig, context: LayerContext, name: BranchName):
        super().__init__()
        self.beta = branch.beta

    def scaled(self, output_BTD: Tensor) -> Tensor:
        """The output of the branch times `beta`."""
        return output_BTD if self.beta == 1.0 else self.beta * output_BTD

    @classmethod
    def build_norm(cls, config: ResidualConfig, context: LayerContext) -> RMSNorm:
        """Build the norm of one branch; by default over one hidden state [B, T, D]."""
        return RMSNorm.of(context.norm, context.hidden_size)

    @abstractmethod
    def read(self, stream: Stream, norm: RMSNorm) -> tuple[Tensor, Any]:
        """Read the input of the branch from the stream.

        Args:
            stream: the stream before the branch.
            norm: the norm of the branch, applied here or in `write`, as the branch's options say.

        Returns:
            The input [B, T, D], and what `write` needs of the stream.
        """

    @abstractmethod
    def write(self, kept: Any, output_BTD: Tensor, norm: RMSNorm) -> Stream:
        """Write the output of the branch to the stream.

        Args:
            kept: the second result of `read`.
            output_BTD: the output of the branch.
            norm: as in `read`.

        Returns:
            The stream after the branch.
        """

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter, by its name within this module: what an optimizer groups them by."""
        return find_roles(self)

    def init_weights(self, std: float) -> None:
        """Initialise parameters and buffers; `std` is for plain projections."""


class Residual(KeepsFP32, ABC):
    """Begins and ends the stream of a model. It may have parameters of its own.

    `branch` is the class that joins a branch to the stream. `fp32_parameters` are those of a mixer.
    """

    branch: ClassVar[type[ResidualBranch]]

    def __init__(self, config: ResidualConfig, context: LayerContext):
        super().__init__()

    @abstractmethod
    def start(self, embedding_BTD: Tensor) -> Stream:
        """Make the stream before the first layer from the embedding [B, T, D]."""

    @abstractmethod
    def end(self, stream: Stream) -> Tensor:
        """Make the input [B, T, D] of the final norm from the stream after the last layer."""

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The role of every parameter, by its name within this module: what an optimizer groups them by."""
        return find_roles(self)

    def init_weights(self, std: float) -> None:
        """Initialise parameters and buffers; `std` is for plain projections."""


RESIDUALS = KindRegistry("residual", ResidualConfig, key="form", default="single")


def register_residual(form: str, config: type[ResidualConfig]) -> Callable[[type[Residual]], type[Residual]]:
    """Register a class of residuals under `form`, the value of `model.residual.form` that chooses it."""

    def add(cls: type[Residual]) -> type[Residual]:
        RESIDUALS.register(form, config, cls)
        return cls

    return add


def build_residual(config: ResidualConfig, context: LayerContext) -> Residual:
    """Build the module that begins and ends the stream of a model."""
    return RESIDUALS.implementation(config.form)(config, context)


def build_residual_branch(config: ResidualConfig, branch: BranchConfig, context: LayerContext,
                          name: BranchName) -> ResidualBranch:
    """Build the module that joins the mixer or the feed-forward of layer `context.layer_index` to the stream."""
    return RESIDUALS.implementation(config.form).branch(config, branch, context, name)


def build_branch_norm(config: ResidualConfig, context: LayerContext) -> RMSNorm:
    """Build the norm of a mixer or a feed-forward, as the residual wants it."""
    return RESIDUALS.implementation(config.form).branch.build_norm(config, context)
