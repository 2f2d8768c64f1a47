"""Cases of sparse attention and of the selection of keys for the doctor, the tests and the benchmark."""

import torch
import torch.nn.functional as F

from hybridlm_kernels.cases import BenchCase, CheckCase, Inputs, OperationCases, Shape, randn
from hybridlm_kernels.ops.sparse_attention import indexer_topk, sparse_attention
from hybridlm_kernels.random_inputs import bench_inputs, random_selection

MAX_INDEX_HEADS = 16
KEYS_PER_SELECTED = 8  # top-k is the length over this


def _check() -> Inputs:
    return randn(q=(2, 70, 4, 32), k=(2, 70, 2, 32), v=(2, 70, 2, 32)) | {"indices": random_selection()}


def _bench_index(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    heads = min(s.H, MAX_INDEX_HEADS)
    return {"q": torch.randn(s.B, s.T, heads, s.D, dtype=dtype, device=device),
            "k": torch.randn(s.B, s.T, s.D, dtype=dtype, device=device),
            "w": torch.rand(s.B, s.T, heads, dtype=dtype, device=device)}


def _bench(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """One key head for all queries, as in the absorbed form of MLA. Keys drawn twice are left out once."""
    inputs = bench_inputs("none")(s, dtype, device)
    keys = {name: inputs[name][:, :, :1].contiguous() for name in "kv"}
    visible_T1 = torch.arange(1, s.T + 1, device=device)[:, None]
    picks = (torch.rand(s.B, s.T, s.T // KEYS_PER_SELECTED, device=device) * visible_T1).int().sort(-1).values
    repeated = F.pad(picks[..., 1:] == picks[..., :-1], (1, 0))
    return {"q": inputs["q"], **keys, "indices": picks.masked_fill(repeated, -1)}


CASES: list[OperationCases] = [
    # Selections are lists of integers without a gradient: tests compare them, the doctor does not.
    ([], [BenchCase(f"1 key in {KEYS_PER_SELECTED}", indexer_topk, _bench_index,
                    lambda s: s.tokens * s.T * (s.D + 1.0) * min(s.H, MAX_INDEX_HEADS),
                    input_options=lambda inputs: {"topk": inputs["q"].shape[1] // KEYS_PER_SELECTED})]),
    ([CheckCase("sparse_attention", "top-16 of 70", sparse_attention, _check)],
     [BenchCase(f"1 key in {KEYS_PER_SELECTED}", sparse_attention, _bench,
                lambda s: 4.0 * s.tokens * s.H * s.D * (s.T // KEYS_PER_SELECTED), ("q", "k", "v"))]),
]
