"""Cases of Sinkhorn-Knopp for the doctor, the tests and the benchmark."""

from hybridlm_kernels.cases import CheckCase, Inputs, OperationCases, randn
from hybridlm_kernels.ops.sinkhorn import sinkhorn


def _positive() -> Inputs:
    return {name: x.exp() for name, x in randn(matrix_MM=(3, 40, 4, 4)).items()}


CASES: list[OperationCases] = [([CheckCase("sinkhorn", "4 streams", sinkhorn, _positive, {"iterations": 5})], [])]
