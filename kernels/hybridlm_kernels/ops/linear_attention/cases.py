"""Cases of linear attention for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import BenchCase, CheckCase, OperationCases
from hybridlm_kernels.ops.linear_attention import linear_attention
from hybridlm_kernels.random_inputs import bench_inputs, check_inputs

CHECKS = [CheckCase("linear_attention", f"{decay} decay", linear_attention, check_inputs(decay, False),
                    fixed=("g",) if decay == "constant" else (), causal=True)
          for decay in ("none", "constant", "scalar", "channel")]
CASES: list[OperationCases] = [(CHECKS, [
    BenchCase(label, linear_attention, bench_inputs(decay), lambda s: 5.0 * s.tokens * s.H * s.D**2,
              ("q", "k", "v") if decay == "constant" else ("q", "k", "v", "g"), {"final_state": False},
              one_head_stands_for_all=True)
    for label, decay in (("Lightning", "constant"), ("Mamba-2 form", "scalar"), ("GLA", "channel"))])]
