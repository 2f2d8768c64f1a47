"""The indexer's loss in blocks of queries; memory grows with S, never with T times S.

The gradient is known once the distributions of a block are, so it is computed in the forward, when it is wanted at
all, and the backward only scales it: the main attention's scores are computed once.

B rows, T queries (the last T positions), S keys, J index heads, I index dim, H query heads, G key heads, R = H/G,
K key dim, N listed keys per query, Q queries of a block, X keys that a block may see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.precision import wide as to_wide

CPU_BLOCK_ELEMENTS = 2**19  # scores per block of queries: in or near the cache
GPU_BLOCK_ELEMENTS = 2**27


def query_blocks(queries: int, elements_per_query: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of blocks of queries whose scores stay within the budget."""
    budget = CPU_BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    size = max(8, budget // max(1, elements_per_query) // 8 * 8)
    for start in range(0, queries, size):
        yield start, min(start + size, queries)


def indexer_kl(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor,
               indices_BTN: Tensor | None, recall_of_BTN: Tensor | None, scale: float,
               cu_seqlens: CuSeqlens | None) -> tuple[Tensor, ...]:
    """The torch backend; arguments as in the public function, already checked."""
    index = (q_BTJI, k_BSI, w_BTJ)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in index)
    with torch.autocast(q_BTJI.device.type, enabled=False):
        if indices_BTN is not None:
            return BlockwiseKL.apply(*index, ListedKeysKL, (main_q_BTHK, main_k_BSGK, scale, indices_BTN), learns)
        recall = None if recall_of_BTN is None else RecallSums(recall_of_BTN, k_BSI.device)
        main = MainAttention(main_q_BTHK, main_k_BSGK, scale, cu_seqlens, at_least=q_BTJI.shape[2])
        loss, entropy = BlockwiseKL.apply(*index, VisibleKeysKL, (main, recall), learns)
    return (loss, entropy) if recall is None else (loss, entropy, *recall.means())


class BlockwiseKL(torch.autograd.Function):
    """Loss and entropy summed by blocks of queries; gradients are computed in the forward and scaled in the backward.

    `block_sums` is the subclass of `KLSums` that walks over the blocks, made with `arguments`.
    """

    @staticmethod
    def forward(ctx, q_BTJI, k_BSI, w_BTJ, block_sums, arguments, learns):
        sums = block_sums(q_BTJI, k_BSI, w_BTJ, learns, *arguments)
        loss, entropy = sums.run()
        if learns:
            ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(sums.grads(), (q_BTJI, k_BSI, w_BTJ), strict=True)))
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @plain_backward
    def backward(ctx, dloss, _):
        return (*(dloss.to(g.dtype) * g for g in ctx.saved_tensors), None, None, None)


class KLSums(ABC):
    """Adds up loss, entropy and gradients over blocks of queries."""

    def __init__(self, q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, learns: bool):
        self.batch, self.queries, self.heads, self.dim = q_BTJI.shape
        self.keys, self.device = k_BSI.shape[1], q_BTJI.device
        self.q_BTJI, self.k_BSI, self.w_BTJ, self.learns = q_BTJI, to_wide(k_BSI), w_BTJ, learns
        wide = self.k_BSI.dtype
        self.loss = self.entropy = torch.zeros((), dtype=wide, device=self.device)
        if learns:
            self.dq_BTJI = torch.empty(q_BTJI.shape, dtype=wide, device=self.device)
            self.dw_BTJ = torch.empty(w_BTJ.shape, dtype=wide, device=self.device)
            self.dk_BSI = torch.zeros_like(self.k_BSI)

    @abstractmethod
    def count(self) -> Tensor:
        """The number of queries that have a key."""

    @abstractmethod
    def add_blocks(self) -> None:
        """Adds the blocks of queries one after the other."""

    def run(self) -> tuple[Tensor, Tensor]:
        """Mean loss and mean entropy over the queries that have a key."""
        self.add_blocks()
        return self.loss / self.count(), self.entropy / self.count()

    def grads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the mean loss by q, k and w."""
        count = self.count()
        return self.dq_BTJI.div_(count), self.dk_BSI.div_(count), self.dw_BTJ.div_(count)

    def add(self, p: Tensor, score: Tensor, seen: Tensor) -> Tensor:
        """Adds loss and entropy of distributions over the last dim; returns the gradient at the scores.

        Where nothing is seen at all, `p` and `score` are finite and count for nothing.
        """
        log_q = torch.log_softmax(score, -1).masked_fill_(~seen, 0.0)
        q = log_q.exp() * seen
        self.loss = self.loss + (torch.xlogy(p, p) - p * log_q).sum()
        self.entropy = self.entropy - (q * log_q).sum()
        return q.sub_(p)

    def add_visible(self, rows: slice, low: int, high: int, p_BQX: Tensor, seen_BQX: Tensor) -> None:
        """Adds a block of queries against the index keys from `low` up to `high`, in place."""
        size = rows.stop - rows.start
        k_BXI = self.k_BSI[:, low:high]
        q_BZI = self.q_BTJI[:, rows].to(k_BXI.dtype).flatten(1, 2)
        w_BQJ = self.w_BTJ[:, rows].to(k_BXI.dtype)
        dots = torch.bmm(q_BZI, k_BXI.transpose(1, 2)).relu_().view(self.batch * size, self.heads, high - low)
        score = torch.bmm(w_BQJ.reshape(-1, 1, self.heads), dots).view(self.batch, size, high - low)
        hidden_BQX = ~seen_BQX & seen_BQX.any(-1, keepdim=True)
        d_BQX = self.add(p_BQX.to(k_BXI.dtype), score.masked_fill_(hidden_BQX, -torch.inf), seen_BQX)
        if self.learns:
            d_Z1X = d_BQX.view(-1, 1, high - low)
            self.dw_BTJ[:, rows] = torch.bmm(dots, d_Z1X.transpose(1, 2)).view(w_BQJ.shape)
            ddots = (dots > 0) * (d_Z1X * w_BQJ.reshape(-1, self.heads, 1))
            ddots = ddots.view(self.batch, size * self.heads, high - low)
            self.dq_BTJI[:, rows] = torch.bmm(ddots, k_BXI).view(self.batch, size, self.heads, self.dim)
            self.dk_BSI[:, low:high].baddbmm_(ddots.transpose(1, 2), q_BZI)


class VisibleKeysKL(KLSums):
    """The loss over all visible keys, read in place: a block of queries against the keys up to its last."""

    def __init__(self, q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, learns: bool, main: MainAttention,
                 recall: RecallSums | None):
        super().__init__(q_BTJI, k_BSI, w_BTJ, learns)
        self.main, self.recall = main, recall

    def count(self) -> Tensor:
        return self.loss.new_tensor(self.batch * self.queries)  # each query sees itself

    def add_blocks(self) -> None:
        for rows, low, high, seen_BQX in self.main.blocks():
            p_BQX = self.main.attention(rows, low, high, seen_BQX)
            if self.recall is not None:
                self.recall.add(p_BQX, seen_BQX, rows, low)
            self.add_visible(rows, low, high, p_BQX, seen_BQX)


class ListedKeysKL(KLSums):
    """The loss over the listed keys alone, gathered for each query."""

    def __init__(self, q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, learns: bool, main_q_BTHK: Tensor,
                 main_k_BSGK: Tensor, scale: float, indices_BTN: Tensor):
        super().__init__(q_BTJI, k_BSI, w_BTJ, learns)
        self.main_q_BTHK, self.scale, self.groups = main_q_BTHK, scale, main_k_BSGK.shape[2]
        self.main_k_ZX = main_k_BSGK.flatten(0, 1).flatten(1)
        self.row_BTN, self.seen_BTN = self.rows_of(indices_BTN, self.keys)
        self.widest = max(self.main_k_ZX.shape[1] + main_q_BTHK.shape[2], self.dim + self.heads)

    def rows_of(self, indices_BTN: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """Rows of flattened keys (0 for an absent one), and which are there."""
        offset_B11 = torch.arange(self.batch, device=self.device)[:, None, None] * keys
        seen_BTN = indices_BTN >= 0
        return (indices_BTN.long() + offset_B11).masked_fill(~seen_BTN, 0), seen_BTN

    def count(self) -> Tensor:
        return self.seen_BTN.any(-1).sum().clamp(min=1)

    def target(self, rows: slice, seen_ZN: Tensor) -> tuple[Tensor, Tensor]:
        """p of the listed keys, zero for absent ones, and which of them count."""
        return self.attention(rows, self.row_BTN[:, rows], ~seen_ZN & seen_ZN.any(-1, keepdim=True)) * seen_ZN, seen_ZN

    def add_blocks(self) -> None:
        listed = self.row_BTN.shape[2]
        for start, stop in query_blocks(self.queries, self.batch * listed * self.widest, self.device):
            rows = slice(start, stop)
            row_BQN = self.row_BTN[:, rows]
            seen_ZN = self.seen_BTN[:, rows].flatten(0, 1)
            k_ZNI = self.k_BSI.flatten(0, 1).index_select(0, row_BQN.flatten()).view(-1, listed, self.dim)
            q_ZJI = self.q_BTJI[:, rows].to(k_ZNI.dtype).flatten(0, 1)
            w_ZJ = self.w_BTJ[:, rows].to(k_ZNI.dtype).flatten(0, 1)
            dots_ZJN = torch.bmm(q_ZJI, k_ZNI.transpose(1, 2)).relu_()
            score_ZN = torch.bmm(w_ZJ[:, None], dots_ZJN)[:, 0]
            p_ZN, seen_ZN = self.target(rows, seen_ZN)
            hidden_ZN = ~seen_ZN & seen_ZN.any(-1, keepdim=True)
            d_ZN = self.add(p_ZN, score_ZN.masked_fill_(hidden_ZN, -torch.inf), seen_ZN)
            if self.learns:
                self.dw_BTJ[:, rows] = torch.bmm(dots_ZJN, d_ZN[..., None])[..., 0].unflatten(0, row_BQN.shape[:2])
                ddots_ZJN = (dots_ZJN > 0) * (d_ZN[:, None] * w_ZJ[..., None])
                self.dq_BTJI[:, rows] = torch.bmm(ddots_ZJN, k_ZNI).unflatten(0, row_BQN.shape[:2])
                # an absent key has no gradient, so that adding it to row 0 changes nothing
                self._add_rows(torch.bmm(ddots_ZJN.transpose(1, 2), q_ZJI).flatten(0, 1), row_BQN.flatten())

    def attention(self, rows: slice, row_BQN: Tensor, hidden_ZN: Tensor) -> Tensor:
        """Main attention [Z, N] of the queries `rows` to the keys in `row_BQN`, averaged over heads."""
        k = to_wide(self.main_k_ZX.index_select(0, row_BQN.flatten())).view(
            -1, row_BQN.shape[2], self.groups, self.main_k_ZX.shape[1] // self.groups).transpose(1, 2)
        q = to_wide(self.main_q_BTHK[:, rows]).flatten(0, 1).unflatten(1, (self.groups, -1)) * self.scale
        score = torch.matmul(q, k.transpose(2, 3)).masked_fill_(hidden_ZN[:, None, None], -torch.inf)
        return torch.softmax(score, -1).mean((1, 2)).to(self.k_BSI.dtype)

    def _add_rows(self, grad: Tensor, row: Tensor) -> None:
        """dk[row] += grad, in a fixed order."""
        total = self.batch * self.keys
        summed = torch.ops.aten.embedding_dense_backward(grad.contiguous(), row, total, -1, False)
        self.dk_BSI += summed.view(self.dk_BSI.shape)


class MainAttention:
    """The main attention averaged over heads, for blocks of queries against the keys they may see."""

    def __init__(self, q_BTHK: Tensor, k_BSGK: Tensor, scale: float, cu_seqlens: CuSeqlens | None, at_least: int = 1):
        self.batch, self.queries, self.heads = q_BTHK.shape[:3]
        self.keys, self.groups, self.device = k_BSGK.shape[1], k_BSGK.shape[2], q_BTHK.device
        self.q_BTHK, self.scale = q_BTHK, scale
        self.k_ZKS = to_wide(k_BSGK).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
        self.elements = self.batch * self.keys * max(self.heads, at_least)
        self.position_T = torch.arange(self.keys - self.queries, self.keys, device=self.device)
        self.first_BT = self.position_T.new_zeros(1, self.queries)
        self.first = [0] * self.queries
        if cu_seqlens is not None:
            self.first_BT = cu_seqlens.first_keys(self.batch, self.queries)
            self.first = _first_keys(cu_seqlens, self.keys)[-self.queries :]

    def blocks(self) -> Iterator[tuple[slice, int, int, Tensor]]:
        """Yields (queries, first key, last key + 1, mask [B, Q, X] of the keys that each query sees)."""
        for start, stop in query_blocks(self.queries, self.elements, self.device):
            low, high = self.first[start], self.keys - self.queries + stop
            s_X = torch.arange(low, high, device=self.device)
            seen = (s_X <= self.position_T[start:stop, None]) & (s_X >= self.first_BT[:, start:stop, None])
            yield slice(start, stop), low, high, seen.expand(self.batch, -1, -1)

    def attention(self, rows: slice, low: int, high: int, seen_BQX: Tensor) -> Tensor:
        """Attention p [B, Q, X] of the queries `rows` to the keys from `low` up to `high`."""
        size = rows.stop - rows.start
        q = to_wide(self.q_BTHK[:, rows]).transpose(1, 2).reshape(self.batch * self.groups, -1, self.q_BTHK.shape[3])
        score = torch.bmm(q * self.scale, self.k_ZKS[..., low:high])
        score = score.view(self.batch, self.heads, size, high - low)
        return torch.softmax(score.masked_fill_(~seen_BQX[:, None], -torch.inf), -1).mean(1)


def _first_keys(cu_seqlens: CuSeqlens, length: int) -> list[int]:
    """The first key of the document at each position of a row, the least over the rows."""
    if "indexer_kl" not in cu_seqlens.cache:
        first = [length] * length
        for start, stop in zip(cu_seqlens.host, cu_seqlens.host[1:], strict=False):
            begin = start % length
            for t in range(begin, begin + stop - start):
                first[t] = min(first[t], begin)
        cu_seqlens.cache["indexer_kl"] = first
    return cu_seqlens.cache["indexer_kl"]


def attention_recall(main_q_BTHK: Tensor, main_k_BSGK: Tensor, indices_BTN: Tensor, scale: float,
                     cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    with torch.autocast(main_q_BTHK.device.type, enabled=False):
        main = MainAttention(main_q_BTHK, main_k_BSGK, scale, cu_seqlens)
        recall = RecallSums(indices_BTN, main_q_BTHK.device)
        for rows, low, high, seen_BQX in main.blocks():
            recall.add(main.attention(rows, low, high, seen_BQX), seen_BQX, rows, low)
        return recall.means()


class RecallSums:
    """Adds up the attention on listed keys over blocks of queries."""

    def __init__(self, indices_BTN: Tensor, device: torch.device):
        self.indices_BTN = indices_BTN
        self.rank_N = torch.arange(indices_BTN.shape[2], device=device)
        self.mass = self.agreement = self.attainable = self.count = torch.zeros((), device=device)

    def add(self, p_BQX: Tensor, seen_BQX: Tensor, rows: slice, low: int) -> None:
        """Adds the queries `rows`, with their attention p to the keys from `low` on."""
        width = p_BQX.shape[-1]
        place_BQN = self.indices_BTN[:, rows].long() - low
        place_BQN = place_BQN.masked_fill((place_BQN < 0) | (place_BQN >= width), width)
        listed_BQX = torch.zeros(*p_BQX.shape[:2], width + 1, dtype=torch.bool, device=p_BQX.device)
        listed_BQX = listed_BQX.scatter_(-1, place_BQN, True)[..., :-1] & seen_BQX
        n_BQ = listed_BQX.sum(-1)
        chose_BQ = seen_BQX.sum(-1) > n_BQ
        best = p_BQX.masked_fill(~seen_BQX, -1.0).topk(min(len(self.rank_N), width), dim=-1)
        counts_BQN = self.rank_N[: best.indices.shape[-1]] < n_BQ[..., None]
        hits_BQ = (listed_BQX.gather(-1, best.indices) & counts_BQN).sum(-1)
        self.mass = self.mass + ((p_BQX * listed_BQX).sum(-1) * chose_BQ).sum()
        self.agreement = self.agreement + (hits_BQ.to(p_BQX.dtype) / n_BQ.clamp(min=1) * chose_BQ).sum()
        self.attainable = self.attainable + ((best.values * counts_BQN).sum(-1) * chose_BQ).sum()
        self.count = self.count + chose_BQ.sum()

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean mass, agreement and attainable mass."""
        some, count = self.count > 0, self.count.clamp(min=1)
        mass, agreement, attainable = (torch.where(some, x / count, 1.0)
                                       for x in (self.mass, self.agreement, self.attainable))
        return mass, agreement, attainable
