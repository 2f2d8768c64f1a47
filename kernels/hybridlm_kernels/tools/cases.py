"""Cases of every operation: calls that `doctor.py` and the tests check, and calls that `bench.py` times.

`operation_cases` has one entry per operation; a new operation needs one more. A benchmark runs at a shape of B rows, T
tokens, H heads of D dims. Its FLOPs are those of the mathematics, a multiplication and an addition counted as two: the
recurrence token by token for the linear family, the visible half of the scores for causal attention, so that backends
compare whatever they compute beyond that (chunks, recomputation). A backward counts twice the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybridlm_kernels as ops
from hybridlm_kernels.tools.recurrence_inputs import recurrence_inputs

# Sizes of benchmarks that a shape does not give.
VOCABULARY = 32768
MAX_LOSS_TOKENS = 8192
EXPERTS = 16
EXPERTS_PER_TOKEN = 2
MAX_MODEL_DIM = 4096  # operations without heads have H * D numbers per token, up to this
MAX_INDEX_HEADS = 16
KEYS_PER_SELECTED = 8  # top-k is the length over this


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
        """Tokens of all rows."""
        return self.B * self.T

    @property
    def model_dim(self) -> int:
        """Numbers per token of the operations without heads."""
        return min(self.H * self.D, MAX_MODEL_DIM)


# The six that projects quote for linear attention.
COMMON_SHAPES = (Shape(1, 8192, 96, 128), Shape(2, 16384, 16, 128), Shape(4, 2048, 16, 128),
                 Shape(4, 4096, 64, 128), Shape(8, 2048, 32, 256), Shape(8, 1024, 8, 64))
# The same head dims with fewer heads and tokens: what a CPU can do while one waits.
SMALL_SHAPES = tuple(dict.fromkeys(Shape(1, max(256, s.T // 16), max(2, s.H // 16), s.D) for s in COMMON_SHAPES))

Inputs = dict[str, Tensor]
MakeInputs = Callable[[Shape, torch.dtype, str], Inputs]


@dataclass(frozen=True)
class CheckCase:
    """One call to check against the reference.

    `inputs` makes fp64 tensors by name; floating ones get gradients unless named in `fixed`.
    """

    operation: str
    label: str
    run: Callable[..., Any]
    inputs: Callable[[], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    causal: bool = False  # time is dimension 1 of the inputs and of the first output


@dataclass(frozen=True)
class BenchCase:
    """One call to time. `make(shape, dtype, device)` gives its tensors by name; those in `trained` get gradients.

    Without any `trained`, the forward alone is timed.
    """

    operation: str
    label: str
    make: MakeInputs
    flops: Callable[[Shape], float]  # of the forward
    trained: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, inputs: Inputs, backend: str | None) -> Tensor:
        """Runs the call; returns its first output."""
        operation = getattr(ops, self.operation)
        options = dict(self.options)
        if self.operation == "indexer_topk":
            options["topk"] = inputs["q"].shape[1] // KEYS_PER_SELECTED
        out = operation(**by_parameter(operation, inputs), **options, backend=backend)
        return out[0] if isinstance(out, tuple) else out


OperationCases = tuple[list[CheckCase], list[BenchCase]]


def by_parameter(operation: Callable[..., Any], tensors: Inputs) -> Inputs:
    """Tensors under the parameter names of the operation, which carry shape suffixes (`q` is `q_BTHK`)."""
    parameters = inspect.signature(operation).parameters
    return {next((p for p in parameters if p == name or p.rsplit("_", 1)[0] == name), name): value
            for name, value in tensors.items()}


def operation_cases() -> Iterator[OperationCases]:
    """Yields the checks and the benchmarks of every operation; checks are small enough for a few seconds on a CPU."""
    yield _delta_rule_cases()
    yield _linear_attention_cases()
    yield ([CheckCase("attention", "grouped heads", ops.attention,
                      lambda: _randn(q=(2, 70, 4, 32), k=(2, 70, 2, 32), v=(2, 70, 2, 32)), causal=True)],
           [BenchCase("attention", "causal", _recurrent("none"), lambda s: 2.0 * s.tokens * s.T * s.H * s.D,
                      ("q", "k", "v"))])
    yield ([CheckCase("short_conv", "width 4, silu", ops.short_conv, lambda: _randn(x=(2, 131, 24), weight=(24, 4)),
                      causal=True)],
           [BenchCase("short_conv", "width 4, silu",
                      _tokens(lambda s: {"x": (s.B, s.T, s.model_dim), "weight": (s.model_dim, 4)}),
                      lambda s: 8.0 * s.tokens * s.model_dim, ("x", "weight"), {"activation": "silu"})])
    yield ([CheckCase("rms_norm", "zero-centred", ops.rms_norm, lambda: _randn(x=(3, 40, 64), weight=(64,)),
                      {"eps": 1e-6, "zero_centered": True})],
           [BenchCase("rms_norm", "per token",
                      _tokens(lambda s: {"x": (s.tokens, s.model_dim), "weight": (s.model_dim,)}),
                      lambda s: 4.0 * s.tokens * s.model_dim, ("x", "weight"), {"eps": 1e-6})])
    yield ([CheckCase("gated_rms_norm", "silu", ops.gated_rms_norm,
                      lambda: _randn(x=(3, 40, 64), gate=(3, 40, 64), weight=(64,)), {"eps": 1e-6})],
           [BenchCase("gated_rms_norm", "per head",
                      _tokens(lambda s: {"x": (s.tokens, s.H, s.D), "gate": (s.tokens, s.H, s.D), "weight": (s.D,)}),
                      lambda s: 8.0 * s.tokens * s.H * s.D, ("x", "gate", "weight"), {"eps": 1e-6})])
    yield [CheckCase("l2_norm", "per row", ops.l2_norm, lambda: _randn(x=(3, 40, 64)))], []
    yield ([CheckCase("swiglu", "clamped", ops.swiglu, lambda: _randn(gate=(50, 32), up=(50, 32)), {"limit": 2.0})],
           [BenchCase("swiglu", "per token",
                      _tokens(lambda s: {"gate": (s.tokens, s.model_dim), "up": (s.tokens, s.model_dim)}),
                      lambda s: 5.0 * s.tokens * s.model_dim, ("gate", "up"))])
    yield ([CheckCase("rotary", "partial, interleaved", ops.rotary, _rotary_check, {"interleaved": True},
                      fixed=("cos", "sin"))],
           [BenchCase("rotary", "all dims", _rotary, lambda s: 3.0 * s.tokens * s.H * s.D, ("x",))])
    yield ([CheckCase("linear_cross_entropy", "vocabulary 101", ops.linear_cross_entropy,
                      lambda: _randn(x=(70, 32), weight=(101, 32)) | {"labels": torch.randint(0, 101, (70,))})],
           [BenchCase("linear_cross_entropy", f"vocabulary {VOCABULARY}", _loss,
                      lambda s: 2.0 * min(s.tokens, MAX_LOSS_TOKENS) * s.model_dim * VOCABULARY, ("x", "weight"))])
    yield ([CheckCase("moe_experts", "8 experts, top-2", ops.moe_experts, _moe_check)],
           [BenchCase("moe_experts", f"{EXPERTS_PER_TOKEN} of {EXPERTS}", _moe,
                      lambda s: 3.0 * s.tokens * EXPERTS_PER_TOKEN * s.model_dim**2,
                      ("x", "gate_up", "down", "weights"))])
    # Selections are lists of integers without a gradient: tests compare them, the doctor does not.
    yield [], [BenchCase("indexer_topk", f"1 key in {KEYS_PER_SELECTED}", _index,
                         lambda s: s.tokens * s.T * (s.D + 1.0) * min(s.H, MAX_INDEX_HEADS))]
    yield ([CheckCase("sparse_attention", "top-16 of 70", ops.sparse_attention, _sparse_check)],
           [BenchCase("sparse_attention", f"1 key in {KEYS_PER_SELECTED}", _sparse,
                      lambda s: 4.0 * s.tokens * s.H * s.D * (s.T // KEYS_PER_SELECTED), ("q", "k", "v"))])
    main = ("main_q", "main_k")
    yield [CheckCase("indexer_kl", "all keys, packed", ops.indexer_kl, _index_check,
                     {"cu_seqlens": [0, 1, 30, 70, 140]}, fixed=main),
           CheckCase("indexer_kl", "16 of 70 keys", ops.indexer_kl,
                     lambda: _index_check() | {"indices": _indices_check()}, fixed=main)], []
    yield [CheckCase("pooled_indexer_kl", "pools of 8", _pooled_kl, lambda: _index_check() | _randn(k=(2, 8, 16)),
                     fixed=main)], []
    yield [CheckCase("attention_recall", "16 of 70 keys", ops.attention_recall,
                     lambda: _randn(main_q=(2, 70, 4, 32), main_k=(2, 70, 2, 32)) | {"indices": _indices_check()},
                     fixed=main)], []


def check_cases() -> list[CheckCase]:
    """Every call that is checked against the reference, by operation."""
    return [case for checks, _ in operation_cases() for case in checks]


def bench_cases() -> list[BenchCase]:
    """Every call that is timed, in the order of the table."""
    return [case for _, benchmarks in operation_cases() for case in benchmarks]


def _delta_rule_cases() -> OperationCases:
    checks = [CheckCase("delta_rule", f"{decay} decay", ops.delta_rule, _recurrence_check(decay, True), causal=True)
              for decay in ("none", "scalar", "channel")]
    checks.append(CheckCase("delta_rule", "channel decay, packed", ops.delta_rule, _recurrence_check("channel", True),
                            {"cu_seqlens": [0, 1, 65, 131, 140, 262]}))
    return checks, [BenchCase("delta_rule", label, _recurrent(decay, delta=True),
                              lambda s: 7.0 * s.tokens * s.H * s.D**2, ("q", "k", "v", "g", "beta"),
                              {"qk_l2norm": True})
                    for label, decay in (("DeltaNet", "none"), ("GDN", "scalar"), ("KDA", "channel"))]


def _linear_attention_cases() -> OperationCases:
    checks = [CheckCase("linear_attention", f"{decay} decay", ops.linear_attention, _recurrence_check(decay, False),
                        fixed=("g",) if decay == "constant" else (), causal=True)
              for decay in ("none", "constant", "scalar", "channel")]
    return checks, [BenchCase("linear_attention", label, _recurrent(decay), lambda s: 5.0 * s.tokens * s.H * s.D**2,
                              ("q", "k", "v") if decay == "constant" else ("q", "k", "v", "g"))
                    for label, decay in (("Lightning", "constant"), ("Mamba-2 form", "scalar"), ("GLA", "channel"))]


def _randn(**shapes: tuple[int, ...]) -> Inputs:
    """Normal fp64 tensors of the named shapes."""
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def _recurrence_check(decay: str, delta: bool) -> Callable[[], Inputs]:
    """A maker of inputs without initial states, two rows of two full chunks and three tokens."""
    return lambda: recurrence_inputs(decay, B=2, T=131, H=2, HV=2, K=32, V=48, documents=0, beta=delta, strength=3.0)


def _rotary_check() -> Inputs:
    made = _randn(x=(2, 33, 4, 32), cos=(33, 8), sin=(33, 8))
    return made | {"cos": torch.cos(made["cos"]), "sin": torch.sin(made["sin"])}


def _moe_check() -> Inputs:
    made = _randn(x=(60, 32), gate_up=(8, 32, 32), down=(8, 32, 16))
    return made | {"gate_up": made["gate_up"] * 0.2, "down": made["down"] * 0.2,
                   "expert_ids": torch.stack([torch.randperm(8)[:2] for _ in range(60)]),
                   "weights": torch.rand(60, 2, dtype=torch.float64)}


def _indices_check() -> Tensor:
    """16 random visible keys of each of 2 x 70 queries."""
    T = 70
    scores = torch.rand(2, T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -1.0)
    top = scores.topk(16, dim=-1)
    return top.indices.masked_fill(top.values < 0, -1).int()


def _sparse_check() -> Inputs:
    return _randn(q=(2, 70, 4, 32), k=(2, 70, 2, 32), v=(2, 70, 2, 32)) | {"indices": _indices_check()}


def _index_check() -> Inputs:
    made = _randn(q=(2, 70, 4, 16), k=(2, 70, 16), w=(2, 70, 4), main_q=(2, 70, 4, 32), main_k=(2, 70, 2, 32))
    return made | {"w": made["w"] * 0.2}


def _pooled_kl(q: Tensor, k: Tensor, w: Tensor, main_q: Tensor, main_k: Tensor) -> Any:
    return ops.pooled_indexer_kl(q, k, w, main_q, main_k, ops.Pools.of(2, 70, 70, 8, q.device))


def _recurrent(decay: str, delta: bool = False) -> MakeInputs:
    return lambda s, dtype, device: recurrence_inputs(decay, B=s.B, T=s.T, H=s.H, HV=s.H, K=s.D, V=s.D, documents=0,
                                                      beta=delta, strength=0.1, dtype=dtype, device=device)


def _tokens(shapes: Callable[[Shape], dict[str, tuple[int, ...]]]) -> MakeInputs:
    return lambda s, dtype, device: {name: torch.randn(*size, dtype=dtype, device=device)
                                     for name, size in shapes(s).items()}


def _rotary(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    angle_TR = torch.outer(torch.arange(s.T, device=device), 1e4 ** -torch.linspace(0, 1, s.D // 2, device=device))
    return {"x": torch.randn(s.B, s.T, s.H, s.D, dtype=dtype, device=device), "cos": angle_TR.cos(),
            "sin": angle_TR.sin()}


def _loss(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    tokens = min(s.tokens, MAX_LOSS_TOKENS)
    return {"x": torch.randn(tokens, s.model_dim, dtype=dtype, device=device),
            "weight": torch.randn(VOCABULARY, s.model_dim, dtype=dtype, device=device) * s.model_dim**-0.5,
            "labels": torch.randint(0, VOCABULARY, (tokens,), device=device)}


def _moe(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    wide, narrow = s.model_dim, s.model_dim // 2
    return {"x": torch.randn(s.tokens, wide, dtype=dtype, device=device),
            "gate_up": torch.randn(EXPERTS, 2 * narrow, wide, dtype=dtype, device=device) * wide**-0.5,
            "down": torch.randn(EXPERTS, wide, narrow, dtype=dtype, device=device) * narrow**-0.5,
            "expert_ids": torch.rand(s.tokens, EXPERTS, device=device).topk(EXPERTS_PER_TOKEN, -1).indices,
            "weights": torch.rand(s.tokens, EXPERTS_PER_TOKEN, device=device)}


def _index(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    heads = min(s.H, MAX_INDEX_HEADS)
    return {"q": torch.randn(s.B, s.T, heads, s.D, dtype=dtype, device=device),
            "k": torch.randn(s.B, s.T, s.D, dtype=dtype, device=device),
            "w": torch.rand(s.B, s.T, heads, dtype=dtype, device=device)}


def _sparse(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """One key head for all queries, as in the absorbed form of MLA. Keys drawn twice are left out once."""
    inputs = _recurrent("none")(s, dtype, device)
    keys = {name: inputs[name][:, :, :1].contiguous() for name in "kv"}
    visible_T1 = torch.arange(1, s.T + 1, device=device)[:, None]
    picks = (torch.rand(s.B, s.T, s.T // KEYS_PER_SELECTED, device=device) * visible_T1).int().sort(-1).values
    repeated = F.pad(picks[..., 1:] == picks[..., :-1], (1, 0))
    return {"q": inputs["q"], **keys, "indices": picks.masked_fill(repeated, -1)}
