"""Cases of SwiGLU for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, randn, token_inputs
from hybridlm_kernels.ops.swiglu import swiglu

CASES: list[OperationCases] = [(
    [CheckCase("swiglu", "clamped", swiglu, lambda: randn(gate=(50, 32), up=(50, 32)), {"limit": 2.0})],
    [BenchCase("per token", swiglu,
               token_inputs(lambda s: {"gate": (s.tokens, s.model_dim), "up": (s.tokens, s.model_dim)}),
               lambda s: 5.0 * s.tokens * s.model_dim, ("gate", "up"))])]
