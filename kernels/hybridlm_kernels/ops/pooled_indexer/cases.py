"""Cases of the loss of an indexer over pools for the doctor and the tests."""

from typing import Any

from torch import Tensor

from hybridlm_kernels.cases import CheckCase, OperationCases, randn
from hybridlm_kernels.ops.pooled_indexer import Pools, pooled_indexer_kl
from hybridlm_kernels.random_inputs import random_index_inputs


def _run(q: Tensor, k: Tensor, w: Tensor, main_q: Tensor, main_k: Tensor) -> Any:
    return pooled_indexer_kl(q, k, w, main_q, main_k, Pools.of(2, 70, 70, 8, q.device))


CASES: list[OperationCases] = [
    ([CheckCase("pooled_indexer_kl", "pools of 8", _run, lambda: random_index_inputs() | randn(k=(2, 8, 16)),
                fixed=("main_q", "main_k"))], [])]
