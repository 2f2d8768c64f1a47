"""Cases of the memory of Titans for the doctor, the tests and the benchmark."""

from functools import partial

import torch
from torch.nn.functional import normalize

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape
from hybridlm_kernels.ops.titans_memory import titans_memory


def _inputs(B: int, T: int, H: int, K: int, hidden_dim: int, dtype: torch.dtype, device: str) -> Inputs:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    wide = torch.promote_types(dtype, torch.float32)
    gates = {name: most * torch.rand(B, T, H, dtype=wide, device=device)
             for name, most in (("alpha", 1.0), ("eta", 0.9), ("theta", 0.01))}
    weights = 0.02 * torch.randn(H, 2 * K * hidden_dim if hidden_dim else K * K, dtype=wide, device=device)
    return {"q": normalize(randn(B, T, H, K), dim=-1), "k": normalize(randn(B, T, H, K), dim=-1),
            "v": randn(B, T, H, K), **gates, "weights": weights}


def _check(hidden_dim: int) -> Inputs:
    return _inputs(2, 70, 2, 8, hidden_dim, torch.float64, "cpu")


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _inputs(s.B, s.T, s.H, s.D, 0, dtype, device)


CASES: list[OperationCases] = [(
    [CheckCase("titans_memory", label, titans_memory, partial(_check, hidden_dim), options={"hidden_dim": hidden_dim},
               causal=True)
     for label, hidden_dim in (("linear memory", 0), ("memory with a hidden layer", 12))],
    [BenchCase("Titans, linear", titans_memory, _bench, lambda s: 10.0 * s.tokens * s.H * s.D**2,
               ("q", "k", "v", "alpha", "eta", "theta", "weights"))])]
