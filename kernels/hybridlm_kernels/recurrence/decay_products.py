"""Decay inside chunks: scores between tokens of a chunk, and the factors between a chunk and the state.

With a_t = exp(g_t) and tokens j < i of one chunk of C tokens, a score is  x_i . (a_{j+1} ... a_i) k_j.  Products
of decays are built by doubling: from those inside blocks of b tokens to those inside blocks of 2b, with a border
between the halves. a_{j+1} ... a_i is the product from the border to i (a prefix of the second half) times the
product from j to the border (a suffix of the first half). All factors are products of numbers in [0, 1]: nothing
overflows and no two large sums are subtracted, whatever the gate, strong, zero or -inf.

The gradient: a decay g_t is a factor of every pair j < t <= i. With x_i the sum over all pairs of row i of score
times gradient, and y_j the same sum over column j, dg_t = sum_{i>=t} (x_i - y_i). The factors between the chunk and the
state after it have no rows and are summed from the other side: dg_t += sum_{j<t} y_j.

Legend: P chunks, H key heads, r value heads per key head, HV = H r value heads, X = P HV chunk-heads, C tokens per
chunk, K key dim, b tokens per half block, M pairs of half blocks, R row tensors (queries, or queries and keys).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridlm_kernels.recurrence.chunk_layout import StepGroup


@dataclass
class ChunkFactors:
    """Decayed queries, keys and writes: the factors between a chunk and the states before and after it."""

    queries: Tensor  # [X, C, K] q_i a_1 ... a_i
    writes: Tensor  # [X, C, K] k_j a_{j+1} ... a_C
    total: Tensor  # [X, K|1, 1] a_1 ... a_C
    keys: Tensor | None = None  # [X, C, K] k_i a_1 ... a_i, in the delta rule only


@dataclass
class ChunkGradients:
    """Gradients of the chunked q, k [P, H, C, K] and of g (None where it was not asked for)."""

    q: Tensor
    k: Tensor
    g: Tensor | None


def repeat_key_heads(x_PHCK: Tensor, HV: int) -> Tensor:
    """Every key head repeated for its value heads: [P, HV, C, K]."""
    H = x_PHCK.shape[1]
    return x_PHCK if HV == H else x_PHCK.repeat_interleave(HV // H, dim=1)


def sum_value_heads(d_PHvCK: Tensor, H: int) -> Tensor:
    """The gradient of `repeat_key_heads`; a tensor that has H heads already is returned as it is."""
    return d_PHvCK if d_PHvCK.shape[1] == H else d_PHvCK.unflatten(1, (H, -1)).sum(2)


def doublings(C: int) -> list[int]:
    return [2**e for e in range(C.bit_length() - 1)]


def corner_blocks(scores_XCC: Tensor, b: int) -> Tensor:
    """A view [X, C/2b, b, b] of the scores: rows of second halves against columns of the first halves beside them."""
    X, C, _ = scores_XCC.shape
    shape, strides = (X, C // (2 * b), b, b), (C * C, 2 * b * (C + 1), C, 1)
    return scores_XCC.as_strided(shape, strides, scores_XCC.storage_offset() + b * C)


def extend_products(prefix: Tensor, suffix: Tensor) -> None:
    """Extend products inside half blocks to products inside blocks: [M, 2, b, ...], changed in place.

    Products that are negligible become zero.
    """
    first, second = prefix[:, 0, -1:].clone(), prefix[:, 1, -1:].clone()
    drop_negligible(prefix[:, 1].mul_(first))
    drop_negligible(suffix[:, 0].mul_(second))


def sum_from_and_before(x_XCK: Tensor, y_XCK: Tensor | None = None) -> Tensor:
    """The sums over i >= t of x_i plus those over j < t of y_j, as products with triangles of ones.

    This is faster than cumulative sums.
    """
    X, C, _ = x_XCK.shape
    upper = torch.ones(C, C, dtype=x_XCK.dtype, device=x_XCK.device).triu_()
    later = torch.bmm(upper.expand(X, C, C), x_XCK)
    return later if y_XCK is None else later.baddbmm_((1 - upper).expand(X, C, C), y_XCK)


def drop_negligible(decay: Tensor) -> Tensor:
    """Sets decays at or below the root of the smallest normal number (1e-19 in fp32, 1e-154 in fp64) to zero, in place.

    What they multiply is far below the rounding of what it is added to, but their products are denormal numbers, with
    which a CPU multiplies up to 20 times more slowly. NaN stays NaN.
    """
    return torch.threshold_(decay, torch.finfo(decay.dtype).tiny ** 0.5, 0.0)


def drop_tiny(x: Tensor) -> Tensor:
    """Sets denormal numbers, and those that one more factor could make denormal, to zero, in place.

    The limit is the smallest normal number over the rounding error of 1 (1e-31 in fp32, 1e-292 in fp64). NaN stays NaN.

    >>> drop_tiny(torch.tensor([1e-30, -1e-32, 1e-40]))
    tensor([1.0000e-30, 0.0000e+00, 0.0000e+00])
    """
    limits = torch.finfo(x.dtype)
    return torch.hardshrink(x, limits.tiny / limits.eps, out=x)


class ScalarDecay:
    """A scalar decay per head: the scores are a matrix product times a matrix of decays, shared by the K channels."""

    per_channel = False

    def __init__(self, prefix: Tensor, suffix: Tensor, total: Tensor, between: Tensor):
        self.prefix = prefix  # [P|1, HV, C, 1] a_1 ... a_i
        self.suffix = suffix  # [P|1, HV, C, 1] a_{j+1} ... a_C
        self.total = total  # [P|1, HV, 1, 1] a_1 ... a_C
        self.between = between  # [P|1, HV, C, C] a_{j+1} ... a_i strictly below the diagonal, else 0

    @classmethod
    def varying(cls, g_PHvC: Tensor) -> ScalarDecay:
        """From a decay for every token, g [P, HV, C]."""
        P, HV, C = g_PHvC.shape
        prefix = drop_negligible(g_PHvC.exp())
        suffix = torch.ones_like(prefix)
        between = prefix.new_zeros(P * HV, C, C)
        for b in doublings(C):
            p, s = prefix.view(P * HV, -1, 2, b), suffix.view(P * HV, -1, 2, b)
            torch.mul(p[:, :, 1, :, None], s[:, :, 0, None, :], out=corner_blocks(between, b))
            extend_products(p.flatten(0, 1), s.flatten(0, 1))
        drop_negligible(between)
        return cls(prefix[..., None], suffix[..., None], prefix[:, :, -1:, None], between.view(P, HV, C, C))

    @classmethod
    def constant(cls, g_Hv: Tensor, C: int, tokens_P: Tensor | None) -> ScalarDecay:
        """From one decay per head, the same at every token; `tokens_P` counts the tokens of chunks with padding."""
        i = torch.arange(C, device=g_Hv.device)
        tokens = i.new_full((1,), C) if tokens_P is None else tokens_P
        tokens = tokens[:, None, None]
        g = g_Hv.double()[:, None]

        def power(exponent: Tensor) -> Tensor:
            return torch.where(exponent > 0, g * exponent, 0.0).exp()

        apart = i[:, None] - i
        between = power(apart.flatten()).view(-1, C, C) * (apart > 0)
        tables = power((i + 1)[None, None]), power(tokens - 1 - i), power(tokens)
        prefix, suffix, total = (x.to(g_Hv.dtype)[..., None] for x in tables)
        return cls(prefix, suffix, total, between.to(g_Hv.dtype)[None])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the backward pass restores the decay from."""
        return self.prefix, self.suffix, self.total, self.between

    def _heads(self, table: Tensor, H: int) -> Tensor:
        return table.unflatten(1, (H, -1))  # [P|1, HV, ...] -> [P|1, H, r, ...]

    def factors(self, q_PHCK: Tensor, k_PHCK: Tensor, keys: Tensor | None = None) -> ChunkFactors:
        """The factors of a chunk. Writes the decayed keys to `keys` [X, C, K] where given."""
        P, H, C, K = q_PHCK.shape
        prefix, suffix = self._heads(self.prefix, H), self._heads(self.suffix, H)
        if keys is not None:
            torch.mul(k_PHCK[:, :, None], prefix, out=keys.unflatten(0, (P, H, -1)))
        queries, writes = q_PHCK[:, :, None] * prefix, k_PHCK[:, :, None] * suffix
        total = self.total.expand(P, -1, 1, 1).reshape(-1, 1, 1)
        return ChunkFactors(queries.view(-1, C, K), writes.view(-1, C, K), total, keys)

    def scores(self, q_PHCK: Tensor, k_PHCK: Tensor, rows_of_k: bool) -> tuple[Tensor, Tensor | None]:
        """Scores of q against k on and below the diagonal, and of k against k strictly below it: [X, C, C].

        The second is None unless `rows_of_k`.
        """
        P, H, C, K = q_PHCK.shape
        between = self._heads(self.between, H)
        q_YCK, k_YCK = q_PHCK.view(-1, C, K), k_PHCK.view(-1, C, K)

        def against_k(x_YCK: Tensor) -> Tensor:
            return torch.bmm(x_YCK, k_YCK.mT).view(P, H, 1, C, C)

        raw = against_k(q_YCK)
        A = raw * between
        A.diagonal(dim1=-2, dim2=-1).copy_(raw.diagonal(dim1=-2, dim2=-1))
        L = (against_k(k_YCK) * between).view(-1, C, C) if rows_of_k else None
        return A.view(-1, C, C), L

    def backward(self, q_PHCK: Tensor, k_PHCK: Tensor, A_XCC: Tensor, L_XCC: Tensor | None, dA_XCC: Tensor,
                 dL_XCC: Tensor | None, d: ChunkFactors, need_g: bool) -> ChunkGradients:
        """The gradients of q, k and g. Overwrites the gradients it is given.

        Args:
            dA_XCC: gradient of the queries' scores, read on and below the diagonal.
            dL_XCC: gradient of the keys' scores, read strictly below the diagonal; None in linear attention.
            d: gradients of the factors; `d.total` [X, K] is already multiplied by the total.
            need_g: whether the gradient of g is wanted.
        """
        P, H, C, K = shape = q_PHCK.shape
        q_YCK, k_YCK = q_PHCK.view(-1, C, K), k_PHCK.view(-1, C, K)
        q, k = q_PHCK[:, :, None], k_PHCK[:, :, None]
        between, prefix, suffix = (self._heads(x, H) for x in (self.between, self.prefix, self.suffix))
        d_queries, d_writes = d.queries.view(P, H, -1, C, K), d.writes.view(P, H, -1, C, K)
        d_keys = None if d.keys is None else d.keys.view(P, H, -1, C, K)
        x = (q * d_queries).sum(-1, keepdim=True) if need_g else None  # row sums, HV heads: [P, H, r, C, 1]
        y = (k * d_writes).sum(-1, keepdim=True).mul_(suffix) if need_g else None
        if x is not None:
            x = (x if d_keys is None else x.add_((k * d_keys).sum(-1, keepdim=True))).mul_(prefix)

        def sum_over_value_heads(x: Tensor) -> Tensor:
            return (x[:, :, 0] if x.shape[2] == 1 else x.sum(2)).view(-1, *x.shape[3:])

        dS = dA_XCC.view(P, H, -1, C, C) * between
        dS.diagonal(dim1=-2, dim2=-1).copy_(dA_XCC.view(P, H, -1, C, C).diagonal(dim1=-2, dim2=-1))
        dS = sum_over_value_heads(dS)
        dq = sum_over_value_heads(d_queries.mul_(prefix)).baddbmm_(dS, k_YCK).view(shape)
        d_writes = d_writes.mul_(suffix)
        dk = sum_over_value_heads(d_writes if d_keys is None else d_writes.addcmul_(d_keys, prefix))
        dk.baddbmm_(dS.mT, q_YCK)
        if dL_XCC is not None:
            dS = sum_over_value_heads(dL_XCC.view(P, H, -1, C, C) * between)
            dk.baddbmm_(dS + dS.mT, k_YCK)
        if x is None or y is None:
            return ChunkGradients(dq, dk.view(shape), None)
        pairs = dA_XCC.mul_(A_XCC)
        if dL_XCC is not None and L_XCC is not None:
            pairs.addcmul_(dL_XCC, L_XCC)
        pairs.diagonal(dim1=-2, dim2=-1).zero_()
        x = x.view(-1, C).add_(pairs.sum(-1)).sub_(pairs.sum(-2))
        later = torch.ones(C, C, dtype=x.dtype, device=x.device).tril_()
        dg = torch.addmm(d.total.sum(-1, keepdim=True), x, later).addmm_(y.view(-1, C), 1 - later)
        return ChunkGradients(dq, dk.view(shape), dg.view(P, -1, C, 1))


class ChannelDecay:
    """A decay per channel (HV = H): each doubling gives one matrix product of decayed rows and columns.

    The scores of second halves against first halves are decayed to and from the border between them: the rows carry
    prefixes, the columns suffixes, and no [C, C, K] tensor is formed.
    """

    per_channel = True

    def __init__(self, a_PHCK: Tensor):
        self.a = a_PHCK
        self.chunk_products: tuple[Tensor, Tensor] | None = None  # prefix and suffix over the full chunk, once found

    @classmethod
    def varying(cls, g_PHCK: Tensor) -> ChannelDecay:
        """From a decay for every token and channel, g [P, H, C, K]."""
        return cls(drop_negligible(g_PHCK.exp()))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the backward pass restores the decay from."""
        return (self.a,)

    def factors(self, q_PHCK: Tensor, k_PHCK: Tensor, keys: Tensor | None = None) -> ChunkFactors:
        """The factors of a chunk, like `ScalarDecay.factors`."""
        C, K = q_PHCK.shape[2:]
        if self.chunk_products is None:
            prefix, suffix = self.chunk_products = self.a.clone(), torch.ones_like(self.a)
            for b in doublings(C):
                extend_products(prefix.view(-1, 2, b, K), suffix.view(-1, 2, b, K))
        prefix, suffix = self.chunk_products
        if keys is not None:
            torch.mul(k_PHCK.view(-1, C, K), prefix.view(-1, C, K), out=keys)
        total = prefix[:, :, -1].reshape(-1, K, 1)
        return ChunkFactors((q_PHCK * prefix).view(-1, C, K), (k_PHCK * suffix).view(-1, C, K), total, keys)

    def scores(self, q_PHCK: Tensor, k_PHCK: Tensor, rows_of_k: bool) -> tuple[Tensor, Tensor | None]:
        """Scores of q and of k against k, like `ScalarDecay.scores`."""
        C, K = q_PHCK.shape[2:]
        rows = [q_PHCK, k_PHCK] if rows_of_k else [q_PHCK]
        X = self.a.numel() // (C * K)
        scores = [q_PHCK.new_zeros(X, C, C) for _ in rows]
        prefix, suffix = self.chunk_products = self.a.clone(), torch.ones_like(self.a)
        for b in doublings(C):
            p, s = prefix.view(-1, 2, b, K), suffix.view(-1, 2, b, K)
            decayed, columns = self._decayed(rows, k_PHCK, p, s)
            block = decayed.flatten(1, 2) @ columns.mT if b > 1 else (decayed * columns[:, None]).sum(-1)
            block = block.view(X, -1, len(rows), b, b)
            for r, score in enumerate(scores):
                corner_blocks(score, b).copy_(block[:, :, r])
            extend_products(p, s)
        for score in scores:
            drop_tiny(score)  # a product of two decays that are not negligible may be
        scores[0].diagonal(dim1=-2, dim2=-1).copy_((q_PHCK * k_PHCK).sum(-1).view(X, C))
        return scores[0], scores[1] if rows_of_k else None

    def _decayed(self, rows: list[Tensor], k_PHCK: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Second halves of all rows, [M, R, b, K], and first halves of the columns, [M, b, K], both decayed to the
        border between them."""
        _, _, b, K = p.shape
        out = p.new_empty(p.shape[0], len(rows), b, K)
        for r, x in enumerate(rows):
            torch.mul(x.view(-1, 2, b, K)[:, 1], p[:, 1], out=out[:, r])
        columns = k_PHCK.view(-1, 2, b, K)[:, 0]
        return out, columns if b == 1 else columns * s[:, 0]

    def backward(self, q_PHCK: Tensor, k_PHCK: Tensor, A_XCC: Tensor, L_XCC: Tensor | None, dA_XCC: Tensor,
                 dL_XCC: Tensor | None, d: ChunkFactors, need_g: bool) -> ChunkGradients:
        """The gradients of q, k and g, like `ScalarDecay.backward`."""
        C, K = q_PHCK.shape[2:]
        rows, d_scores = [q_PHCK], [dA_XCC]
        if dL_XCC is not None:
            rows, d_scores = [q_PHCK, k_PHCK], [dA_XCC, dL_XCC]
        R = len(rows)
        prefix, suffix = self.a.clone(), torch.ones_like(self.a)
        d_rows = [torch.zeros_like(q_PHCK) for _ in rows]
        dk = torch.zeros_like(k_PHCK)  # from the columns
        for b in doublings(C):
            p, s = prefix.view(-1, 2, b, K), suffix.view(-1, 2, b, K)
            decayed, columns = self._decayed(rows, k_PHCK, p, s)
            d_block = p.new_empty(p.shape[0], R, b, b)
            for r, d_score in enumerate(d_scores):
                corners = corner_blocks(d_score, b)
                d_block[:, r].unflatten(0, corners.shape[:2]).copy_(corners)
            if b == 1:
                d_decayed, d_columns = d_block * columns[:, None], (d_block * decayed).sum(1)
            else:
                d_decayed = (d_block.flatten(1, 2) @ columns).view_as(decayed)
                d_columns = d_block.flatten(1, 2).mT @ decayed.flatten(1, 2)
            for r, d_row in enumerate(d_rows):
                d_row.view(-1, 2, b, K)[:, 1].addcmul_(d_decayed[:, r], p[:, 1])
            dk.view(-1, 2, b, K)[:, 0].addcmul_(d_columns, s[:, 0])
            extend_products(p, s)
        d_rows[0].addcmul_(d.queries.view_as(prefix), prefix)
        if d.keys is not None:
            d_rows[1].addcmul_(d.keys.view_as(prefix), prefix)
        dk_after = d.writes.view_as(suffix).mul_(suffix)
        dg = None
        if need_g:
            x = torch.mul(q_PHCK, d_rows[0]).addcmul_(k_PHCK, dk.neg() if R == 1 else d_rows[1] - dk)
            y = drop_tiny(k_PHCK * dk_after)
            dg = sum_from_and_before(drop_tiny(x).view(-1, C, K), y.view(-1, C, K))
            dg = dg.add_(d.total[:, None]).view_as(self.a)
        diagonal = dA_XCC.diagonal(dim1=-2, dim2=-1).reshape(*q_PHCK.shape[:3], 1)
        dk.add_(dk_after).addcmul_(diagonal, q_PHCK)
        if R == 2:
            dk += d_rows[1]
        return ChunkGradients(d_rows[0].addcmul_(diagonal, k_PHCK), dk, dg)


Decay = ScalarDecay | ChannelDecay


def make_decay(group: StepGroup, g: Tensor | None, HV: int, dtype: torch.dtype) -> Decay:
    """The decay of a group's chunks from g: None, [HV] (constant), [B, T, HV] (scalar), [B, T, HV, K] (per channel)."""
    C = group.layout.chunk
    if g is None:
        return ScalarDecay.constant(torch.zeros(HV, dtype=dtype, device=group.layout.device), C, None)
    if g.dim() == 1:
        return ScalarDecay.constant(g.to(dtype), C, group.tokens_per_chunk)
    if g.dim() == 3:
        return ScalarDecay.varying(group.gather(g[..., None], dtype)[..., 0])
    return ChannelDecay.varying(group.gather(g, dtype))


def restore_decay(tensors: Sequence[Tensor]) -> Decay:
    """The decay that `Decay.tensors` gave these tensors of."""
    return ChannelDecay(*tensors) if len(tensors) == 1 else ScalarDecay(*tensors)
