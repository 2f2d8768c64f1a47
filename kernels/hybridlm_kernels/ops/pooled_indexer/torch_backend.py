"""The pooled indexer in blocks of queries; memory grows with S, never with T times S.

B rows, T queries, S keys, P pools, J index heads, I index dim, H query heads, G key heads, K key dim, M selected pools,
N listed tokens, Q queries of a block, X keys and Y pools that a block may see, Z = B * Q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.ops.indexer_kl.torch_backend import (
    BlockwiseKL,
    KLSums,
    ListedKeysKL,
    MainAttention,
    RecallSums,
    query_blocks,
)
from hybridlm_kernels.ops.pooled_indexer.pools import Pools
from hybridlm_kernels.ops.sparse_attention.torch_backend import select_best
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide as to_wide


def pooled_topk(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, pools: Pools, topk: int, num_first: int = 0,
                num_local: int = 0) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    batch, queries, heads, _ = q_BTJI.shape
    chosen_BTM = torch.empty(batch, queries, topk, dtype=torch.int64, device=q_BTJI.device)
    with torch.no_grad(), torch.autocast(q_BTJI.device.type, enabled=False):
        k_BIP = to_wide(k_BPI).transpose(1, 2)
        rank_P = torch.arange(pools.number, device=q_BTJI.device)
        for start, stop in query_blocks(queries, batch * heads * pools.number, q_BTJI.device):
            rows = slice(start, stop)
            dots = torch.bmm(q_BTJI[:, rows].to(k_BIP.dtype).flatten(1, 2), k_BIP).relu_()
            score_BQP = torch.bmm(w_BTJ[:, rows].to(k_BIP.dtype).reshape(-1, 1, heads),
                                  dots.view(-1, heads, pools.number)).view(batch, -1, pools.number)
            seen_BQP = pools.visible(rows)
            if num_first or num_local:
                rank_BQP = rank_P - pools.first_BT[:, rows, None]
                always = (rank_BQP < num_first) | (rank_BQP >= pools.count_BT[:, rows, None] - num_local)
                score_BQP = score_BQP.masked_fill_(always & seen_BQP, torch.inf)
            chosen_BTM[:, rows] = select_best(score_BQP, seen_BQP, topk, False)
    return pools.tokens(chosen_BTM)


def pooled_indexer_kl(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor,
                      pools: Pools, indices_BTN: Tensor | None, recall_of_BTN: Tensor | None, scale: float,
                      cu_seqlens: CuSeqlens | None) -> tuple[Tensor, ...]:
    """The torch backend; arguments as in the public function, already checked."""
    index = (q_BTJI, k_BPI, w_BTJ)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in index)
    with torch.autocast(q_BTJI.device.type, enabled=False):
        if indices_BTN is not None:
            arguments = (main_q_BTHK, main_k_BSGK, scale, pools, indices_BTN)
            return BlockwiseKL.apply(*index, _ListedPoolsKL, arguments, learns)
        recall = None if recall_of_BTN is None else RecallSums(recall_of_BTN, k_BPI.device)
        main = MainAttention(main_q_BTHK, main_k_BSGK, scale, cu_seqlens)
        loss, entropy = BlockwiseKL.apply(*index, _VisiblePoolsKL, (main, recall, pools), learns)
    return (loss, entropy) if recall is None else (loss, entropy, *recall.means())


def normalise(p: Tensor) -> tuple[Tensor, Tensor]:
    """Divides p by its sum over the last dim; the second result [..., 1] says whether that is more than zero."""
    mass = p.sum(-1, keepdim=True)
    return p / mass.clamp(min=torch.finfo(p.dtype).tiny), mass > 0


class _VisiblePoolsKL(KLSums):
    """The loss over all pools that a query sees: the attention to the keys of a block, added up by pools."""

    def __init__(self, q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, learns: bool, main: MainAttention,
                 recall: RecallSums | None, pools: Pools):
        super().__init__(q_BTJI, k_BPI, w_BTJ, learns)
        self.main, self.recall, self.pools, self.member_BPR = main, recall, pools, pools.members()
        self.counted = self.loss.new_zeros(())

    def count(self) -> Tensor:
        return self.counted.clamp(min=1)

    def add_blocks(self) -> None:
        for rows, low, high, keys_BQX in self.main.blocks():
            p_BQX = self.main.attention(rows, low, high, keys_BQX)
            if self.recall is not None:
                self.recall.add(p_BQX, keys_BQX, rows, low)
            seen_BQY = self.pools.visible(rows, max(1, high // self.pools.size))
            pools = seen_BQY.shape[-1]
            member_B1E = (self.member_BPR[:, :pools] - low).clamp(0, high - low - 1).flatten(1)[:, None]
            p_BQY = p_BQX.gather(-1, member_B1E.expand(-1, p_BQX.shape[1], -1)).unflatten(-1, (pools, -1)).sum(-1)
            p_BQY, some_BQ1 = normalise(p_BQY * seen_BQY)
            self.counted = self.counted + some_BQ1.sum()
            self.add_visible(rows, 0, pools, p_BQY, seen_BQY & some_BQ1)


class _ListedPoolsKL(ListedKeysKL):
    """The loss over the selected pools alone, with the attention to their tokens and the open tail."""

    def __init__(self, q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, learns: bool, main_q_BTHK: Tensor,
                 main_k_BSGK: Tensor, scale: float, pools: Pools, indices_BTN: Tensor):
        super().__init__(q_BTJI, k_BPI, w_BTJ, learns, main_q_BTHK, main_k_BSGK, scale, pools.selected(indices_BTN))
        self.size, self.counted = pools.size, self.loss.new_zeros(())
        self.token_BTN, self.has_token_BTN = self.rows_of(indices_BTN, pools.keys)
        self.widest = max(self.widest, pools.size * (self.main_k_ZX.shape[1] + main_q_BTHK.shape[2]))

    def count(self) -> Tensor:
        return self.counted.clamp(min=1)

    def target(self, rows: slice, seen_ZM: Tensor) -> tuple[Tensor, Tensor]:
        has_ZN = self.has_token_BTN[:, rows].flatten(0, 1)
        hidden_ZN = ~has_ZN & has_ZN.any(-1, keepdim=True)
        p_ZN = self.attention(rows, self.token_BTN[:, rows], hidden_ZN)
        p_ZM = p_ZN[:, : seen_ZM.shape[1] * self.size].unflatten(-1, (-1, self.size)).sum(-1)
        p_ZM, some_Z1 = normalise(p_ZM * seen_ZM)
        self.counted = self.counted + some_Z1.sum()
        return p_ZM, seen_ZM & some_Z1
