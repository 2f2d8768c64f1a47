"""Cases of attention over listed blocks for the doctor, the tests and the benchmark."""

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.selected_attention import selected_attention
from hybridlm_kernels.random_inputs import bench_inputs, random_selection

BLOCK = 64  # tokens per block
KEYS_PER_SELECTED = 8  # the budget is the length over this


def _check() -> Inputs:
    return randn(q=(2, 70, 4, 32), k=(2, 70, 2, 32), v=(2, 70, 2, 32), sinks=(4,)) | {
        "indices": torch.where(random_selection() < 18, random_selection(), -1)[:, :, None]}


def random_blocks(rows: int, length: int, lists: int, block: int, count: int, device: str = "cpu") -> torch.Tensor:
    """The own block and count - 1 random earlier ones of each token, -1 where there are fewer: int64 [B, T, U, N]."""
    own_T = torch.arange(length, device=device) // block
    score = torch.rand(rows, length, lists, -(-length // block), device=device)
    number = torch.arange(score.shape[-1], device=device)
    score = score.masked_fill(number > own_T[:, None, None], -1.0).masked_fill(number == own_T[:, None, None], 2.0)
    best = score.topk(min(count, score.shape[-1]), dim=-1)
    return best.indices.masked_fill(best.values < 0, -1)


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    inputs = bench_inputs("none")(s, dtype, device)
    count = max(1, s.T // KEYS_PER_SELECTED // BLOCK)
    return {name: inputs[name] for name in "qkv"} | {"indices": random_blocks(s.B, s.T, s.H, BLOCK, count, device)}


CASES: list[OperationCases] = [(
    [CheckCase("selected_attention", "blocks of 4, window", selected_attention, _check, {"block": 4, "window": 9})],
    [BenchCase(f"1 key in {KEYS_PER_SELECTED}", selected_attention, _bench,
               lambda s: 4.0 * s.tokens * s.H * s.D * max(BLOCK, s.T // KEYS_PER_SELECTED), ("q", "k", "v"),
               {"block": BLOCK})])]
