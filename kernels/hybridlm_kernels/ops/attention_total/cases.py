"""Cases of attention with its total for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, randn
from hybridlm_kernels.ops.attention_total import attention_total
from hybridlm_kernels.random_inputs import bench_inputs

WINDOW = 64

CASES: list[OperationCases] = [(
    [CheckCase("attention_total", "window", attention_total,
               lambda: randn(q=(2, 150, 4, 16), k=(2, 150, 2, 16), v=(2, 150, 2, 16)), {"window": 20}, causal=True)],
    [BenchCase("window of 64", attention_total, bench_inputs("none"),
               lambda s: 4.0 * s.tokens * min(WINDOW, s.T) * s.H * s.D, ("q", "k", "v"), {"window": WINDOW})])]
