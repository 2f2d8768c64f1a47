"""Cases of the norms for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, randn, token_inputs
from hybridlm_kernels.ops.norm import gated_rms_norm, l2_norm, rms_norm

CASES: list[OperationCases] = [
    ([CheckCase("rms_norm", "zero-centred", rms_norm, lambda: randn(x=(3, 40, 64), weight=(64,)),
                {"eps": 1e-6, "zero_centered": True})],
     [BenchCase("per token", rms_norm,
                token_inputs(lambda s: {"x": (s.tokens, s.model_dim), "weight": (s.model_dim,)}),
                lambda s: 4.0 * s.tokens * s.model_dim, ("x", "weight"), {"eps": 1e-6})]),
    ([CheckCase("gated_rms_norm", "silu", gated_rms_norm,
                lambda: randn(x=(3, 40, 64), gate=(3, 40, 64), weight=(64,)), {"eps": 1e-6})],
     [BenchCase("per head", gated_rms_norm,
                token_inputs(lambda s: {"x": (s.tokens, s.H, s.D), "gate": (s.tokens, s.H, s.D), "weight": (s.D,)}),
                lambda s: 8.0 * s.tokens * s.H * s.D, ("x", "gate", "weight"), {"eps": 1e-6})]),
    ([CheckCase("l2_norm", "per row", l2_norm, lambda: randn(x=(3, 40, 64)))], []),
]
