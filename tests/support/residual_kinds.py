"""A residual for tests of the contract: two streams with parameters, and a read of the embedding in every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.parameter_roles import ParameterRole
from hybridlm.model.residual import RESIDUALS, BranchConfig, Residual, ResidualBranch, ResidualConfig, register_residual


@dataclass(kw_only=True)
class TwoStreamsConfig(ResidualConfig):
    form: str = "test_two_streams"
    embedding_weight: float = 0.5

    def check_branch(self, branch: BranchConfig) -> None:
        require(branch.form == "pre", "residual.form", "cannot stand in two streams", got=branch.form, expected="pre")

    def num_params(self, context):
        return 2

    def branch_params(self, context, branch):
        return 2 + 2 * context.hidden_size

    def flops_per_token(self, context, branch):
        return 4.0 * context.hidden_size

    def stream_bytes(self, context):
        return 3 * super().stream_bytes(context)


@dataclass(frozen=True)
class TwoStreams:
    """The streams [B, T, 2, D], and the embedding [B, T, D] that every branch reads."""

    streams_BTSD: Tensor
    embedding_BTD: Tensor


class TwoStreamsBranch(ResidualBranch):
    """x = norm(sum_s read_s h_s + weight * embedding); h_s += softmax(W x)_s y."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("read_weights",)

    def __init__(self, config, branch, context, name):
        super().__init__(config, branch, context, name)
        self.embedding_weight = config.embedding_weight
        self.read_weights = nn.Parameter(torch.empty(2))
        self.proj = nn.Linear(context.hidden_size, 2, bias=False)

    def read(self, stream, norm):
        mixed = torch.einsum("s,btsd->btd", self.read_weights, stream.streams_BTSD)
        x_BTD = norm(mixed + self.embedding_weight * stream.embedding_BTD)
        return x_BTD, (stream, self.proj(x_BTD).softmax(-1))

    def write(self, kept, output_BTD, norm):
        stream, write_BTS = kept
        return TwoStreams(stream.streams_BTSD + write_BTS[..., None] * output_BTD[:, :, None], stream.embedding_BTD)

    def init_weights(self, std):
        nn.init.constant_(self.read_weights, 0.5)
        nn.init.normal_(self.proj.weight, std=std)


class TwoStreamsResidual(Residual):
    """Both streams begin as the embedding; the final norm gets their weighted sum."""

    branch = TwoStreamsBranch

    def __init__(self, config, context):
        super().__init__(config, context)
        self.end_weights = nn.Parameter(torch.empty(1, 2))

    def start(self, embedding_BTD):
        return TwoStreams(embedding_BTD[:, :, None].expand(-1, -1, 2, -1), embedding_BTD)

    def end(self, stream):
        return torch.einsum("s,btsd->btd", self.end_weights[0], stream.streams_BTSD)

    def parameter_roles(self):
        return {"end_weights": ParameterRole("vector")}

    def init_weights(self, std):
        nn.init.constant_(self.end_weights, 0.5)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The residual of this file can be built inside the block."""
    register_residual("test_two_streams", TwoStreamsConfig)(TwoStreamsResidual)
    try:
        yield
    finally:
        del RESIDUALS["test_two_streams"]
