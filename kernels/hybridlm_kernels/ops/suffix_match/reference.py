"""The definition: every suffix of the queries is looked for among the keys, and every bit is flipped for the gradient.

Legend: B rows, T tokens, C channels, N streams, b bits of a symbol.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.ops.suffix_match.matched_signs import MatchedSigns, read_at
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.registry import Call


def longest_match(queries: list[int], keys: list[int], t: int) -> int:
    """The index behind the longest match of the queries up to t, the latest of these; 0 where there is none.

    >>> longest_match([1, 2, 1], [1, 2, 3], 2)
    1
    """
    for length in range(t, 0, -1):
        for j in range(t - 1, length - 2, -1):
            if keys[j - length + 1 : j + 1] == queries[t - length + 1 : t + 1]:
                return j + 1
    return 0


def supports(call: Call) -> tuple[bool, str]:
    """Whole rows only: nothing is kept between calls."""
    return (False, "it has no run lengths") if call.get("continued") or call.get("final_runs") else (True, "")


def suffix_match(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, scale_C: Tensor, bits: int, unmatched: str,
                 runs: None, final_runs: bool, cu_seqlens: CuSeqlens | None) -> tuple[Tensor, None]:
    """The reference backend; arguments as in the public function, already checked."""

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return MatchedSigns.apply(q, k, v, scale_C, bits, unmatched, match, flips)

    tensors = (q_BTC, k_BTC, v_BTC)
    return rows(*tensors) if cu_seqlens is None else each_document_row(rows, tensors, cu_seqlens), None


def match(q_NT: Tensor, k_NT: Tensor) -> Tensor:
    """The index behind the match, [N, T]."""
    found = [[longest_match(q, k, t) for t in range(len(q))] for q, k in zip(q_NT.tolist(), k_NT.tolist(), strict=True)]
    return torch.tensor(found, dtype=torch.int32, device=q_NT.device)


def flips(q_NT: Tensor, k_NT: Tensor, signs_NTb: Tensor, dy_NTb: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of sum(dy * read) when each bit of q and of k is flipped, one after the other."""

    def total(q: Tensor, k: Tensor) -> Tensor:
        return (read_at(signs_NTb, match(q, k)) * dy_NTb).sum((1, 2))

    changes = []
    before_N = total(q_NT, k_NT)
    for which in range(2):
        change_NTb = torch.zeros_like(dy_NTb)
        for t in range(q_NT.shape[1]):
            for bit in range(dy_NTb.shape[2]):
                flipped = [q_NT.clone(), k_NT.clone()]
                flipped[which][:, t] ^= 1 << bit
                change_NTb[:, t, bit] = total(*flipped) - before_N
        changes.append(change_NTb)
    return changes[0], changes[1]
