"""Cases of softmax attention for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases, randn
from hybridlm_kernels.ops.attention import attention
from hybridlm_kernels.random_inputs import bench_inputs

CASES: list[OperationCases] = [(
    [CheckCase("attention", "grouped heads", attention,
               lambda: randn(q=(2, 70, 4, 32), k=(2, 70, 2, 32), v=(2, 70, 2, 32)), causal=True)],
    [BenchCase("causal", attention, bench_inputs("none"), lambda s: 2.0 * s.tokens * s.T * s.H * s.D,
               ("q", "k", "v"))])]
