"""Cases of test-time training for the doctor, the tests and the benchmark."""

from functools import partial

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.ttt_memory import memory_size, ttt_memory


def _inputs(B: int, T: int, H: int, K: int, hidden_dim: int, dtype: torch.dtype, device: str) -> Inputs:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    wide = torch.promote_types(dtype, torch.float32)
    return {"q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, H, K),
            "rate": torch.rand(B, T, H, dtype=wide, device=device) / K,
            "scale": 1.0 / torch.arange(1, 17, dtype=wide, device=device),
            "weights": 0.02 * torch.randn(H, memory_size(K, hidden_dim), dtype=wide, device=device),
            "norm_weight": torch.ones(H, K, dtype=wide, device=device),
            "norm_bias": torch.zeros(H, K, dtype=wide, device=device)}


def _check(hidden_dim: int) -> Inputs:
    return _inputs(2, 70, 2, 8, hidden_dim, torch.float64, "cpu")


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _inputs(s.B, s.T, s.H, s.D, 0, dtype, device)


CASES: list[OperationCases] = [(
    [CheckCase("ttt_memory", label, ttt_memory, partial(_check, hidden_dim),
               options={"hidden_dim": hidden_dim}, causal=True)
     for label, hidden_dim in (("linear memory", 0), ("memory with a hidden layer", 12))],
    [BenchCase("TTT-Linear", ttt_memory, _bench, lambda s: 6.0 * s.tokens * s.H * s.D**2,
               ("q", "k", "v", "rate", "weights"))])]
