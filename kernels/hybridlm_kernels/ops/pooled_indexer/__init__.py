"""The indexer of sparse attention over pools of keys: selection and loss. Costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, int32

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.indexer_kl import IndexerKL, Recall, check_main, empty_kl
from hybridlm_kernels.ops.pooled_indexer import reference, torch_backend
from hybridlm_kernels.ops.pooled_indexer.pools import Pools as Pools
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

POOLED_TOPK = register(Operation("pooled_topk", (
    Backend("torch", torch_backend.pooled_topk), Backend("reference", reference.pooled_topk))))
POOLED_INDEXER_KL = register(Operation("pooled_indexer_kl", (
    Backend("torch", torch_backend.pooled_indexer_kl), Backend("reference", reference.pooled_indexer_kl))))


def _selection(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, pools: Pools, topk: int, **_: Any) -> Tensor:
    return q_BTJI.new_empty((*q_BTJI.shape[:2], topk * pools.size + pools.size - 1), dtype=int32)


def _kl(q_BTJI: Tensor, *_: Any, recall_of_BTN: Tensor | None = None, **__: Any) -> IndexerKL:
    return empty_kl(q_BTJI, recall_of_BTN)


@compilable(_selection)
def pooled_topk(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, pools: Pools, topk: int, *, num_first: int = 0,
                num_local: int = 0, backend: str | None = None) -> Tensor:
    """Selects for each query the tokens of the `topk` pools of highest score, and its open tail; without gradient.

    Scores are as in `indexer_topk`, one per pool; a query sees the complete pools of its document. Equal scores go to
    the earlier pool.

    Args:
        q_BTJI: index queries [B, T, J, I], activated.
        k_BPI: index keys [B, P, I], activated, one per pool.
        w_BTJ: weights of the index heads [B, T, J], activated, with the scales I**-0.5 and J**-0.5.
        pools: the places of the P pools in the rows, `Pools.of`.
        topk: number of pools per query, at least 1.
        num_first: the first so many pools of the document are always among the `topk`.
        num_local: the last so many complete pools up to the query are, too.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        int32 [B, T, topk * size + size - 1]: positions in the row; -1 where fewer are visible. The pools are
        ascending, absent ones last, then comes the tail.

    Raises:
        ValueError: the shapes do not fit one another, topk is below 1, or more pools are always selected than topk.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: NSA, Yuan et al. 2025, sections 3.3.1 and 3.3.2, with the indexer of DeepSeek-V3.2 in place of its scores.

    >>> import torch
    >>> pools = Pools.of(1, 5, 5, 2, torch.device("cpu"))  # tokens 0 and 1, 2 and 3; token 4 is an open tail
    >>> q, w, k = torch.ones(1, 5, 1, 1), torch.ones(1, 5, 1), torch.tensor([[[1.0], [3.0]]])
    >>> pooled_topk(q, k, w, pools, 1)[0, -1]
    tensor([2, 3, 4], dtype=torch.int32)
    """
    _check_index("pooled_topk", q_BTJI, k_BPI, w_BTJ, pools)
    if topk < 1 or num_first < 0 or num_local < 0 or num_first + num_local > topk:
        raise ValueError("pooled_topk: topk must be at least 1 and hold num_first and num_local; got "
                         f"{topk}, {num_first} and {num_local}")
    q_BTJI, k_BPI, w_BTJ = q_BTJI.detach(), k_BPI.detach(), w_BTJ.detach()
    chosen = choose(POOLED_TOPK, Call.of(q_BTJI, k_BPI, w_BTJ), backend)
    return chosen.run(q_BTJI, k_BPI, w_BTJ, pools, topk, num_first, num_local)


@compilable(_kl)
def pooled_indexer_kl(q_BTJI: Tensor, k_BPI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor,
                      pools: Pools, *, indices_BTN: Tensor | None = None, recall_of_BTN: Tensor | None = None,
                      scale: float | None = None, cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
                      backend: str | None = None) -> IndexerKL:
    """The loss KL(P || softmax(I)) of an indexer over pools: P_tp is the main attention of token t on pool p.

    The main attention is over all visible keys, or over the listed ones. It is summed over heads and over the tokens of
    a pool, then normalised over the pools that count: all that the query sees, or the selected. The open tail is always
    read, so it takes no part. The gradient goes to q, k and w alone and is exact.

    Args:
        q_BTJI: index queries [B, T, J, I], activated.
        k_BPI: index keys [B, P, I], activated, one per pool.
        w_BTJ: weights of the index heads [B, T, J], activated, scales included.
        main_q_BTHK: queries of the main attention [B, T, H, K], activated.
        main_k_BSGK: keys of the main attention [B, S, G, K], activated; query head h reads key head h // (H/G).
        pools: the places of the P pools in the rows, `Pools.of`.
        indices_BTN: a result of `pooled_topk`. None: all visible pools.
        recall_of_BTN: likewise, without `indices_BTN`: its `attention_recall`, from the same pass.
        scale: factor on the main scores, K**-0.5 by default.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*S keys.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        Loss and entropy in nats, means over the queries with a pool that counts, and the recall of `recall_of_BTN`.

    Raises:
        ValueError: the shapes do not fit one another, or both lists are given.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: DeepSeek-V3.2, 2025, section 2.1, eq. 3 and 4, with pools in place of keys.

    >>> import torch
    >>> pools = Pools.of(1, 4, 4, 2, torch.device("cpu"))
    >>> q, w, k = torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1), torch.zeros(1, 2, 1)
    >>> main_q = main_k = torch.zeros(1, 4, 1, 1)  # equal attention: equal scores are right
    >>> abs(float(pooled_indexer_kl(q, k, w, main_q, main_k, pools).loss)) < 1e-6
    True
    """
    name = "pooled_indexer_kl"
    _check_index(name, q_BTJI, k_BPI, w_BTJ, pools)
    if indices_BTN is not None and recall_of_BTN is not None:
        raise ValueError(f"{name}: recall_of needs the attention to all keys: pass it without indices")
    for index in (indices_BTN, recall_of_BTN):
        check_main(name, main_q_BTHK, main_k_BSGK, index, (*q_BTJI.shape[:2], pools.keys))
    if cu_seqlens is not None:
        cu_seqlens = CuSeqlens.of(cu_seqlens, q_BTJI.device).filled
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
