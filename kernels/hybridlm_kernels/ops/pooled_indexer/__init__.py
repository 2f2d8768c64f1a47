"""The indexer of sparse attention over pools of keys: selection and loss. Costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridlm_kernels.ops.indexer_kl import IndexerKL, Recall, check_main
from hybridlm_kernels.ops.pooled_indexer import reference
from hybridlm_kernels.ops.pooled_indexer import torch_backend as eager
from hybridlm_kernels.ops.pooled_indexer.pools import Pools as Pools
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

POOLED_TOPK = register(Operation("pooled_topk", (
    Backend("torch", eager.pooled_topk), Backend("reference", reference.pooled_topk))))
POOLED_INDEXER_KL = register(Operation("pooled_indexer_kl", (
    Backend("torch", eager.pooled_indexer_kl), Backend("reference", reference.pooled_indexer_kl))))


def pooled_topk(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, pools: Pools, topk: int, *, num_first: int = 0,
                num_local: int = 0, backend: str | None = None) -> Tensor:
    """The tokens each query attends to: those of the `topk` pools of highest score, and its open tail.

    Scores are as in `indexer_topk`, one a pool; a query sees the complete pools of its document. Equal scores go to
    the earlier pool. No gradient.

    Args:
        q_BTJI, w_BTJ: [B, T, J, I] and [B, T, J], scales included.
        k_BPI: [B, P, I], one key a pool.
        pools: where the P pools lie.
        topk: how many pools, at least 1.
        num_first, num_local: the first pools of the document and its last complete ones are always among the `topk`.

    Returns:
        int32 [B, T, topk * size + size - 1]: positions in the row; -1 where fewer are visible. The pools are
        ascending, absent ones last, then comes the tail.

    Raises:
        ValueError: shapes that do not fit, topk below 1, or more pools always selected than topk.
    """
    _check_index("pooled_topk", q_BTJI, k_BPI, w_BTJ, pools)
    if topk < 1 or num_first < 0 or num_local < 0 or num_first + num_local > topk:
        raise ValueError("pooled_topk: topk must be at least 1 and hold num_first and num_local; got "
                         f"{topk}, {num_first} and {num_local}")
    q_BTJI, k_BPI, w_BTJ = q_BTJI.detach(), k_BPI.detach(), w_BTJ.detach()
    chosen = choose(POOLED_TOPK, Call.of(q_BTJI, k_BPI, w_BTJ), backend)
    return chosen.run(q_BTJI, k_BPI, w_BTJ, pools, topk, num_first, num_local)


def pooled_indexer_kl(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor,
                      pools: Pools, *, indices_BTN: Tensor | None = None, recall_of_BTN: Tensor | None = None,
                      scale: float | None = None, cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
                      backend: str | None = None) -> IndexerKL:
    """KL(P || softmax(I)) over pools, with P_tp the share of the main attention of token t on pool p.

    The main attention is over all visible keys, or over the listed ones; summed over heads and over the tokens of a
    pool, then normalised over the pools that count: all that the query sees, or the selected. The open tail is always
    read, so it takes no part. The gradient goes to q, k and w alone and is exact.

    Args:
        q_BTJI, k_BPI, w_BTJ, pools: as in `pooled_topk`.
        main_q_BTHK, main_k_BSGK, scale, cu_seqlens: as in `indexer_kl`.
        indices_BTN: what `pooled_topk` returned. None: all visible pools.
        recall_of_BTN: likewise, without `indices_BTN`: what `attention_recall` says of it, from the same pass.

    Raises:
        ValueError: shapes that do not fit, or both lists.
    """
    name = "pooled_indexer_kl"
    _check_index(name, q_BTJI, k_BPI, w_BTJ, pools)
    if indices_BTN is not None and recall_of_BTN is not None:
        raise ValueError(f"{name}: recall_of needs the attention to all keys: pass it without indices")
    for index in (indices_BTN, recall_of_BTN):
        check_main(name, main_q_BTHK, main_k_BSGK, index, (*q_BTJI.shape[:2], pools.keys))
    if cu_seqlens is not None:
        cu_seqlens = CuSeqlens.of(cu_seqlens, q_BTJI.device)
    scale = main_q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose(POOLED_INDEXER_KL, Call.of(q_BTJI, k_BPI, w_BTJ, selected=indices_BTN is not None), backend)
    loss, entropy, *recall = chosen.run(q_BTJI, k_BPI, w_BTJ, main_q_BTHK.detach(), main_k_BSGK.detach(), pools,
                                        indices_BTN, recall_of_BTN, scale, cu_seqlens)
    return IndexerKL(loss, entropy, None if recall_of_BTN is None else Recall(*recall))


def _check_index(name: str, q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, pools: Pools) -> None:
    batch, queries, heads, dim = q_BTJI.shape
    if k_BPI.shape != (batch, pools.number, dim):
        raise ValueError(f"{name}: k must be {[batch, pools.number, dim]}; got {list(k_BPI.shape)}")
    if w_BTJ.shape != (batch, queries, heads):
        raise ValueError(f"{name}: w must be {[batch, queries, heads]}; got {list(w_BTJ.shape)}")
    if pools.count_BT.shape != (batch, queries):
        raise ValueError(f"{name}: the pools are those of {list(pools.count_BT.shape)} queries; got "
                         f"{[batch, queries]}")
