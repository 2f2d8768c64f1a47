"""Cases of the short convolution for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, randn, token_inputs
from hybridlm_kernels.ops.short_conv import short_conv

CASES: list[OperationCases] = [(
    [CheckCase("short_conv", "width 4, silu", short_conv, lambda: randn(x=(2, 131, 24), weight=(24, 4)), causal=True)],
    [BenchCase("width 4, silu", short_conv,
               token_inputs(lambda s: {"x": (s.B, s.T, s.model_dim), "weight": (s.model_dim, 4)}),
               lambda s: 8.0 * s.tokens * s.model_dim, ("x", "weight"), {"activation": "silu"})])]
