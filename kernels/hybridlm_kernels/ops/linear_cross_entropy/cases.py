"""Cases of the loss for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.linear_cross_entropy import linear_cross_entropy

VOCABULARY = 32768
MAX_LOSS_TOKENS = 8192


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    tokens = min(s.tokens, MAX_LOSS_TOKENS)
    return {"x": torch.randn(tokens, s.model_dim, dtype=dtype, device=device),
            "weight": torch.randn(VOCABULARY, s.model_dim, dtype=dtype, device=device) * s.model_dim**-0.5,
            "labels": torch.randint(0, VOCABULARY, (tokens,), device=device)}


CASES: list[OperationCases] = [(
    [CheckCase("linear_cross_entropy", "vocabulary 101", linear_cross_entropy,
               lambda: randn(x=(70, 32), weight=(101, 32)) | {"labels": torch.randint(0, 101, (70,))})],
    [BenchCase(f"vocabulary {VOCABULARY}", linear_cross_entropy, _bench,
               lambda s: 2.0 * min(s.tokens, MAX_LOSS_TOKENS) * s.model_dim * VOCABULARY, ("x", "weight"))])]
