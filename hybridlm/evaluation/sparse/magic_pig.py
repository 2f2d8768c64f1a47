"""Keys of a prompt that are drawn by hashes, and weighed by the chance with which they are drawn.

    a key is drawn where K hashes of it and of the query agree in at least 2 of L tables
    p = 1 - angle(q, k) / pi,   P = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1)
    attention over what is read with scores s - log P for keys that were drawn, s for those that are always read

A hash is the sign of a product with a random vector. Keys are taken relative to the mean of those that may be drawn,
which changes the angles and not the attention.

Source: Chen et al. 2024, MagicPIG (arXiv 2410.16179), section 4, and its code. Unbiased only over the random vectors,
which `seed` fixes.
T tokens of a document, Q queries of a piece, H query heads, D head dim, K hashes of a table, L tables, P keys that may
be drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.errors import require
from hybridlm.evaluation.sparse.block_map import per_query_head
from hybridlm.evaluation.sparse.contract import KeyReader, PromptMethod, register_sparse_method

AGREEING_TABLES = 2
SMALL = 1e-5  # expected number of agreeing tables below which the chance is computed by its series
MAX_HASHES = 32  # bits of a number that holds those of a table


@dataclass(frozen=True, kw_only=True)
class MagicPIG(PromptMethod):
    """Keys drawn from a prompt by hashes, per query head; the first layer dense, as published beside every 16th.

    Args:
        hashes: bits of a table K.
        tables: number of tables L.
        first: first tokens of the document, which are always read.
        local: last tokens of the prompt, which are always read, as all tokens behind it are.
        seed: seed of the random vectors that hashes are made from.
        dense_layers: first softmax layers that stay dense.
    """

    hashes: int = 10
    tables: int = 150
    first: int = 4
    local: int = 64
    seed: int = 0
    dense_layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "hashes")
        self.require_at_least(2, "tables")
        self.require_at_least(0, "first", "local")
        require(self.hashes <= MAX_HASHES, "hashes", "is too large", got=self.hashes, expected=f"at most {MAX_HASHES}")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _DrawnKeys(self, *per_query_head(q_THK, k_TGK))

    def log_chance(self, cosine: Tensor) -> Tensor:
        """Logarithm of the chance P that a key is drawn, from its cosine with the query.

        With x = p^K the chance is 1 - (1 - x)^(L - 1) (1 + (L - 1) x). Where x is small, this cancels, and the start of
        its series L (L - 1) / 2 x^2 (1 - 2 (L - 2) x / 3) takes its place. Computed in fp64; finite for every cosine.

        >>> MagicPIG(hashes=10, tables=150).log_chance(torch.tensor([-0.55]))
        tensor([-13.8068])
        """
        others = self.tables - 1
        p = 1 - torch.arccos(cosine.double().clamp(-1, 1)) / math.pi
        log_x = self.hashes * p.clamp(min=torch.finfo(p.dtype).eps).log()
        x = log_x.exp()
        series = math.log(self.tables * others / 2) + 2 * log_x + torch.log1p(-2 * (self.tables - 2) * x / 3)
        closed = torch.log(-torch.expm1(others * torch.log1p(-x) + torch.log1p(others * x)))
        return torch.where(x * self.tables < SMALL, series, closed).to(cosine.dtype)


class _DrawnKeys(KeyReader):
    def __init__(self, method: MagicPIG, q_HTD: Tensor, k_HTD: Tensor):
        self.method = method
        tokens, dim = k_HTD.shape[1:]
        self.prompt = method.prompt_tokens(tokens)
        self.drawn = slice(method.first, max(method.first, self.prompt - method.local))
        k_HPD = k_HTD[:, self.drawn]
        k_HPD = k_HPD - k_HPD.mean(1, keepdim=True)
        generator = torch.Generator().manual_seed(method.seed)
        vectors = torch.randn(dim, method.tables * method.hashes, generator=generator, dtype=torch.float64).to(k_HPD)
        self.q_HTD, self.k_HPD = q_HTD, k_HPD
        self.q_codes_HTL, self.k_codes_HPL = (self._codes(x, vectors) for x in (q_HTD, k_HPD))

    def _codes(self, x_HTD: Tensor, vectors: Tensor) -> Tensor:
        """The bits of each table as one number, [H, T, L]."""
        bits = (x_HTD @ vectors > 0).unflatten(-1, (self.method.tables, -1))
        return (bits * 2 ** torch.arange(self.method.hashes, device=bits.device)).sum(-1)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        if rows.start < self.prompt:
            return None
        mask_HQT = torch.ones_like(scores_HQT, dtype=torch.bool)
        agree_HQP = torch.zeros_like(scores_HQT[..., self.drawn], dtype=torch.int32)
        for q_HQ, k_HP in zip(self.q_codes_HTL[:, rows].unbind(-1), self.k_codes_HPL.unbind(-1), strict=True):
            agree_HQP += q_HQ[..., None] == k_HP[:, None]
        mask_HQT[..., self.drawn] = agree_HQP >= AGREEING_TABLES
        return mask_HQT

    def correction(self, rows: slice) -> Tensor | None:
        if rows.start < self.prompt:
            return None
        q_HQD, k_HPD = F.normalize(self.q_HTD[:, rows], dim=-1), F.normalize(self.k_HPD, dim=-1)
        found = torch.zeros(*q_HQD.shape[:2], self.q_HTD.shape[1], dtype=q_HQD.dtype, device=q_HQD.device)
        found[..., self.drawn] = -self.method.log_chance(torch.einsum("hqd,hpd->hqp", q_HQD, k_HPD))
        return found


register_sparse_method("magicpig", MagicPIG)
