"""What `bench.py` times: every operation at a shape of B rows, T tokens, H heads of D dims.

FLOPs are those of the mathematics, a multiplication and an addition counted as two: the recurrence token by token for
the linear family, the visible half of the scores for causal attention. What a backend computes beyond that (chunks,
recomputation) is its own affair, so that backends compare. A backward counts twice the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybridlm_kernels as ops
from hybridlm_kernels.tools.doctor import by_parameter
from hybridlm_kernels.tools.recurrence_inputs import recurrence_inputs

VOCABULARY, LOSS_TOKENS = 32768, 8192
EXPERTS, TOP_EXPERTS = 16, 2
MODEL_DIM = 4096  # at most: of the operations on whole tokens, which have H * D numbers per token
INDEX_HEADS = 16  # at most
SELECTED = 8  # top-k is the length over this


@dataclass(frozen=True)
class Shape:
    """B rows, T tokens per row, H heads, D dims per head."""

    B: int
    T: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} H{self.H} D{self.D}"

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def model_dim(self) -> int:
        return min(self.H * self.D, MODEL_DIM)


# The six that projects quote for linear attention.
COMMON = (Shape(1, 8192, 96, 128), Shape(2, 16384, 16, 128), Shape(4, 2048, 16, 128), Shape(4, 4096, 64, 128),
          Shape(8, 2048, 32, 256), Shape(8, 1024, 8, 64))
# The same head dims with fewer heads and tokens: what a CPU can do while one waits.
SMALL = tuple(dict.fromkeys(Shape(1, max(256, s.T // 16), max(2, s.H // 16), s.D) for s in COMMON))

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call. `make(shape, dtype, device)` gives its tensors by name; those in `trained` get gradients.

    Without any `trained`, the forward alone is timed.
    """

    operation: str
    label: str
    make: Callable[[Shape, torch.dtype, str], Inputs]
    flops: Callable[[Shape], float]  # of the forward
    trained: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, inputs: Inputs, backend: str | None) -> Tensor:
        """The first output."""
        operation = getattr(ops, self.operation)
        options = dict(self.options)
        if self.operation == "indexer_topk":
            options["topk"] = inputs["q"].shape[1] // SELECTED
        out = operation(**by_parameter(operation, inputs), **options, backend=backend)
        return out[0] if isinstance(out, tuple) else out


def cases() -> Iterator[Case]:
    """Every case, in the order of the table."""
    for label, decay in (("DeltaNet", "none"), ("GDN", "scalar"), ("KDA", "channel")):
        yield Case("delta_rule", label, _recurrent(decay, delta=True), lambda s: 7.0 * s.tokens * s.H * s.D**2,
                   ("q", "k", "v", "g", "beta"), {"qk_l2norm": True})
    for label, decay in (("Lightning", "constant"), ("Mamba-2 form", "scalar"), ("GLA", "channel")):
        yield Case("linear_attention", label, _recurrent(decay), lambda s: 5.0 * s.tokens * s.H * s.D**2,
                   ("q", "k", "v") if decay == "constant" else ("q", "k", "v", "g"))
    yield Case("attention", "causal", _recurrent("none"), lambda s: 2.0 * s.tokens * s.T * s.H * s.D, ("q", "k", "v"))
    yield Case("short_conv", "width 4, silu",
               _tokens(lambda s: {"x": (s.B, s.T, s.model_dim), "weight": (s.model_dim, 4)}),
               lambda s: 8.0 * s.tokens * s.model_dim, ("x", "weight"), {"activation": "silu"})
    yield Case("rms_norm", "per token", _tokens(lambda s: {"x": (s.tokens, s.model_dim), "weight": (s.model_dim,)}),
               lambda s: 4.0 * s.tokens * s.model_dim, ("x", "weight"), {"eps": 1e-6})
    yield Case("gated_rms_norm", "per head",
               _tokens(lambda s: {"x": (s.tokens, s.H, s.D), "gate": (s.tokens, s.H, s.D), "weight": (s.D,)}),
               lambda s: 8.0 * s.tokens * s.H * s.D, ("x", "gate", "weight"), {"eps": 1e-6})
    yield Case("swiglu", "per token",
               _tokens(lambda s: {"gate": (s.tokens, s.model_dim), "up": (s.tokens, s.model_dim)}),
               lambda s: 5.0 * s.tokens * s.model_dim, ("gate", "up"))
    yield Case("rotary", "whole heads", _rotary, lambda s: 3.0 * s.tokens * s.H * s.D, ("x",))
    yield Case("linear_cross_entropy", f"vocabulary {VOCABULARY}", _loss,
               lambda s: 2.0 * min(s.tokens, LOSS_TOKENS) * s.model_dim * VOCABULARY, ("x", "weight"))
    yield Case("moe_experts", f"{TOP_EXPERTS} of {EXPERTS}", _moe,
               lambda s: 3.0 * s.tokens * TOP_EXPERTS * s.model_dim**2, ("x", "gate_up", "down", "weights"))
    yield Case("indexer_topk", f"1 key in {SELECTED}", _index,
               lambda s: s.tokens * s.T * (s.D + 1.0) * min(s.H, INDEX_HEADS))
    yield Case("sparse_attention", f"1 key in {SELECTED}", _sparse,
               lambda s: 4.0 * s.tokens * s.H * s.D * (s.T // SELECTED), ("q", "k", "v"))


Make = Callable[[Shape, torch.dtype, str], Inputs]


def _recurrent(decay: str, delta: bool = False) -> Make:
    return lambda s, dtype, device: recurrence_inputs(decay, B=s.B, T=s.T, H=s.H, HV=s.H, K=s.D, V=s.D, documents=0,
                                                      beta=delta, strength=0.1, dtype=dtype, device=device)


def _tokens(shapes: Callable[[Shape], dict[str, tuple[int, ...]]]) -> Make:
    return lambda s, dtype, device: {name: torch.randn(*size, dtype=dtype, device=device)
                                     for name, size in shapes(s).items()}


def _rotary(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    angle_TR = torch.outer(torch.arange(s.T, device=device), 1e4 ** -torch.linspace(0, 1, s.D // 2, device=device))
    return {"x": torch.randn(s.B, s.T, s.H, s.D, dtype=dtype, device=device), "cos": angle_TR.cos(),
            "sin": angle_TR.sin()}


def _loss(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    tokens = min(s.tokens, LOSS_TOKENS)
    return {"x": torch.randn(tokens, s.model_dim, dtype=dtype, device=device),
            "weight": torch.randn(VOCABULARY, s.model_dim, dtype=dtype, device=device) * s.model_dim**-0.5,
            "labels": torch.randint(0, VOCABULARY, (tokens,), device=device)}


def _moe(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    wide, narrow = s.model_dim, s.model_dim // 2
    return {"x": torch.randn(s.tokens, wide, dtype=dtype, device=device),
            "gate_up": torch.randn(EXPERTS, 2 * narrow, wide, dtype=dtype, device=device) * wide**-0.5,
            "down": torch.randn(EXPERTS, wide, narrow, dtype=dtype, device=device) * narrow**-0.5,
            "expert_ids": torch.rand(s.tokens, EXPERTS, device=device).topk(TOP_EXPERTS, -1).indices,
            "weights": torch.rand(s.tokens, TOP_EXPERTS, device=device)}


def _index(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    heads = min(s.H, INDEX_HEADS)
    return {"q": torch.randn(s.B, s.T, heads, s.D, dtype=dtype, device=device),
            "k": torch.randn(s.B, s.T, s.D, dtype=dtype, device=device),
            "w": torch.rand(s.B, s.T, heads, dtype=dtype, device=device)}


def _sparse(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """One key head for all queries, as in the absorbed form of MLA. Keys drawn twice are left out once."""
    inputs = _recurrent("none")(s, dtype, device)
    keys = {name: inputs[name][:, :, :1].contiguous() for name in "kv"}
    visible_T1 = torch.arange(1, s.T + 1, device=device)[:, None]
    picks = (torch.rand(s.B, s.T, s.T // SELECTED, device=device) * visible_T1).int().sort(-1).values
    repeated = F.pad(picks[..., 1:] == picks[..., :-1], (1, 0))
    return {"q": inputs["q"], **keys, "indices": picks.masked_fill(repeated, -1)}
