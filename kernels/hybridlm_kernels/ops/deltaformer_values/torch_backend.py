"""Values of DeltaFormer in chunks: one triangular system per chunk, behind the attention to all chunks before it.

    (I + diag(beta) strict(P_cc)) U_c = V_c - diag(beta) P_c,earlier U_earlier

A chunk keeps its inputs alone; its scores are computed again in the backward.

B rows, T tokens, P earlier tokens, S = P + T, H query heads, G key/value heads, K key dim, V value dim, C tokens of a
chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

CHUNK_TOKENS = 64


def deltaformer_values(q_BTHK: Tensor, k_BSGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, past_BPHV: Tensor | None,
                       scale: float, cu_seqlens: CuSeqlens | None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""

    def rows(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return _rows(q, k, v, beta, past_BPHV, scale)

    tokens = (q_BTHK, k_BSGK, v_BTGV, beta_BTH)
    if cu_seqlens is not None and cu_seqlens.num_documents > q_BTHK.shape[0]:
        return each_document_row(rows, tokens, cu_seqlens)
    return rows(*tokens)


def _rows(q_BTHK: Tensor, k_BSGK: Tensor, v_BTGV: Tensor, beta_BTH: Tensor, past_BPHV: Tensor | None,
          scale: float) -> Tensor:
    """The values where every row is one document."""
    T, past = q_BTHK.shape[1], k_BSGK.shape[1] - q_BTHK.shape[1]
    copies = q_BTHK.shape[2] // k_BSGK.shape[2]
    q, k, v, beta = (wide(x).transpose(1, 2) for x in (q_BTHK * scale, k_BSGK, v_BTGV, beta_BTH[..., None]))
    k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    earlier = [] if past_BPHV is None else [wide(past_BPHV).transpose(1, 2)]
    found: list[Tensor] = []
    for start in range(0, T, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, T)
        chunk = slice(start, stop)
        found.append(recomputed(_chunk, q[:, :, chunk], k[:, :, : past + stop], v[:, :, chunk], beta[:, :, chunk],
                                *earlier, *found))
    return torch.cat(found, 2).transpose(1, 2).to(v_BTGV.dtype)


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *earlier: Tensor) -> Tensor:
    """The values [B, H, C, V] of a chunk, from those of all chunks before it."""
    C, S = q.shape[2], k.shape[2]
    seen_CS = torch.arange(S, device=q.device) < torch.arange(S - C, S, device=q.device)[:, None]
    score_BHCS = (q @ k.mT).masked_fill(~seen_CS, torch.finfo(q.dtype).min)
    p_BHCS = score_BHCS.softmax(-1) * seen_CS  # a first token sees nothing
    if earlier:
        v = v - beta * (p_BHCS[..., : S - C] @ torch.cat(earlier, 2))
    return torch.linalg.solve_triangular(beta * p_BHCS[..., S - C :], v, upper=False, unitriangular=True)
