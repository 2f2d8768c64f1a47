"""Cases of the routed experts for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.moe import moe_experts

EXPERTS = 16
EXPERTS_PER_TOKEN = 2


def _check() -> Inputs:
    made = randn(x=(60, 32), gate_up=(8, 32, 32), down=(8, 32, 16))
    return made | {"gate_up": made["gate_up"] * 0.2, "down": made["down"] * 0.2,
                   "expert_ids": torch.stack([torch.randperm(8)[:2] for _ in range(60)]),
                   "weights": torch.rand(60, 2, dtype=torch.float64)}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    wide, narrow = s.model_dim, s.model_dim // 2
    return {"x": torch.randn(s.tokens, wide, dtype=dtype, device=device),
            "gate_up": torch.randn(EXPERTS, 2 * narrow, wide, dtype=dtype, device=device) * wide**-0.5,
            "down": torch.randn(EXPERTS, wide, narrow, dtype=dtype, device=device) * narrow**-0.5,
            "expert_ids": torch.rand(s.tokens, EXPERTS, device=device).topk(EXPERTS_PER_TOKEN, -1).indices,
            "weights": torch.rand(s.tokens, EXPERTS_PER_TOKEN, device=device)}


CASES: list[OperationCases] = [(
    [CheckCase("moe_experts", "8 experts, top-2", moe_experts, _check)],
    [BenchCase(f"{EXPERTS_PER_TOKEN} of {EXPERTS}", moe_experts, _bench,
               lambda s: 3.0 * s.tokens * EXPERTS_PER_TOKEN * s.model_dim**2, ("x", "gate_up", "down", "weights"))])]
