"""Cases of attention over listed blocks for the doctor, the tests and the benchmark."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, LoopTrips, OperationCases, Shape, randn
from hybridlm_kernels.ops.selected_attention import selected_attention
from hybridlm_kernels.random_inputs import bench_inputs, random_selection

BLOCK = 64  # tokens per block
KEYS_PER_SELECTED = 8  # the budget is the length over this
SEGMENT_PAIRS = 1024  # that a program of the keys' gradients goes over, with a query head per list


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


def loop_trips(s: Shape, kernel: str, constants: Mapping[str, Any]) -> LoopTrips:
    """The trips of the kernels' loops by the number of pairs of a query and a block that lists name, on average."""
    blocks, count = -(-s.T // BLOCK), max(1, s.T // KEYS_PER_SELECTED // BLOCK)
    if kernel == "join_kernel":  # loops over the parts of a query: by four, then what is left, then one by one
        return LoopTrips([count // 4, count % 4, count])
    if kernel in ("delta_kernel", "add_parts_kernel"):
        return LoopTrips([count] if kernel == "add_parts_kernel" else [])
    # A token lists its own block, and each earlier one as often as any other.
    others = [min(i, count - 1) / i if i else 0.0 for i in range(blocks)]
    pairs = [BLOCK * (1 + sum(others[block + 1 :])) for block in range(blocks)]

    def tiles(size: int) -> int:
        return sum(math.ceil(number / size) for number in pairs)

    if kernel == "add_segments_kernel":  # by four, then one by one
        per_block = tiles(SEGMENT_PAIRS) / blocks
        return LoopTrips([int(per_block) // 4, per_block - int(per_block) // 4 * 4])
    rows, keys = constants["BLOCK_M"] // constants["ROW_HEADS"], constants["BLOCK_C"]
    slots = s.T * count  # the launch has programs for all entries of lists, and for one tile more per block
    if kernel == "key_gradients_kernel":
        return LoopTrips([tiles(rows) / tiles(SEGMENT_PAIRS)], tiles(SEGMENT_PAIRS) / (slots // SEGMENT_PAIRS + blocks))
    return LoopTrips([-(-BLOCK // keys)], tiles(rows) / (slots // rows + blocks))


CASES: list[OperationCases] = [(
    [CheckCase("selected_attention", "blocks of 4, window", selected_attention, _check, {"block": 4, "window": 9})],
    [BenchCase("listed blocks", selected_attention, _bench,
               lambda s: 4.0 * s.tokens * s.H * s.D * max(BLOCK, s.T // KEYS_PER_SELECTED), ("q", "k", "v"),
               {"block": BLOCK}, one_head_stands_for_all=True, loop_trips=loop_trips)])]
