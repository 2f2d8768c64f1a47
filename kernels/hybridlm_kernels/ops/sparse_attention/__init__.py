"""Token-level sparse attention (DSA): the indexer's selection and attention over it. Costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, int32

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.index_checks import check_indices
from hybridlm_kernels.ops.sparse_attention import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend


def _fits(call: Call) -> tuple[bool, str]:
    key_dim, value_dim = call.get("key_dim"), call.get("value_dim")
    if key_dim > 576 or value_dim > 512:
        return False, f"holds keys of up to 576 and values of up to 512 dims; got {key_dim} and {value_dim}"
    return True, ""


INDEXER_TOPK = register(Operation("indexer_topk", (
    lazy_triton_backend(f"{__name__}.triton_index", "indexer_topk"),
    Backend("torch", torch_backend.indexer_topk), Backend("reference", reference.indexer_topk))))
SPARSE_ATTENTION = register(Operation("sparse_attention", (
    lazy_triton_backend(f"{__name__}.triton_backend", "sparse_attention", _fits),
    Backend("torch", torch_backend.sparse_attention), Backend("reference", reference.sparse_attention))))


def _selection(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, topk: int, **_: Any) -> Tensor:
    return q_BTJI.new_empty((*q_BTJI.shape[:2], topk), dtype=int32)


def _outputs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *_: Any, **__: Any) -> Tensor:
    return v_BSGV.new_empty((*q_BTHK.shape[:3], v_BSGV.shape[3]))


@compilable(_selection)
def indexer_topk(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, topk: int, *, num_first: int = 0, num_local: int = 0,
                 cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
                 backend: str | None = None) -> Tensor:
    """Selects for each query the `topk` visible keys of highest score sum_j w_tj relu(q_tj . k_s); without gradient.

    Scores are fp32; equal scores go to the lowest position.

    Args:
        q_BTJI: index queries [B, T, J, I], activated, the last T of S positions.
        k_BSI: index keys [B, S, I], activated, one head.
        w_BTJ: weights of the index heads [B, T, J], activated. Scales belong in q or w (DeepSeek-V3.2: I**-0.5 and
            J**-0.5).
        topk: number of keys per query, at least 1.
        num_first: the first so many keys of the document are always among the `topk`.
        num_local: the last so many keys up to the query itself are, too.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*S keys; a query sees its own document
            only.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        int32 [B, T, topk]: positions in the row (0..S-1), ascending, then -1 where fewer keys are visible.

    Raises:
        ValueError: the shapes do not fit one another, topk is below 1, or more keys are always selected than topk.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: DeepSeek-V3.2, 2025, section 2.1, eq. 1.

    >>> import torch
    >>> q, w, k = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), torch.tensor([[[2.0], [1.0], [3.0]]])
    >>> indexer_topk(q, k, w, 2)
    tensor([[[ 0, -1],
             [ 0,  1],
             [ 0,  2]]], dtype=torch.int32)
    """
    batch, queries, heads, dim = q_BTJI.shape
    if k_BSI.dim() != 3 or k_BSI.shape[0] != batch or k_BSI.shape[2] != dim or k_BSI.shape[1] < queries:
        raise ValueError(f"indexer_topk: k must be [{batch}, S >= {queries}, {dim}]; got {list(k_BSI.shape)}")
    if w_BTJ.shape != (batch, queries, heads):
        raise ValueError(f"indexer_topk: w must be {[batch, queries, heads]}; got {list(w_BTJ.shape)}")
    if topk < 1:
        raise ValueError(f"indexer_topk: topk must be at least 1; got {topk}")
    if num_first < 0 or num_local < 0 or num_first + num_local > topk:
        raise ValueError(f"indexer_topk: num_first and num_local must fit into topk={topk}; got {num_first} and "
                         f"{num_local}")
    cu_seqlens = filled_borders_of(cu_seqlens, batch, k_BSI.shape[1], k_BSI.device)
    q_BTJI, k_BSI, w_BTJ = q_BTJI.detach(), k_BSI.detach(), w_BTJ.detach()
    chosen = choose(INDEXER_TOPK, Call.of(q_BTJI, k_BSI, w_BTJ), backend)
    return chosen.run(q_BTJI, k_BSI, w_BTJ, topk, cu_seqlens, num_first, num_local)


@compilable(_outputs, keeps=("q_BTHK", "k_BSGK", "v_BSGV", "indices_BTN"))
def sparse_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor, *,
                     scale: float | None = None, backend: str | None = None) -> Tensor:
    """Softmax attention of each query over the keys listed for it, and no others.

    Args:
        q_BTHK: queries [B, T, H, K], activated: rotated and normalized where the model does so.
        k_BSGK: keys [B, S, G, K], activated like the queries; query head h reads key head h // (H/G).
        v_BSGV: values [B, S, G, V], activated.
        indices_BTN: integers [B, T, N]: distinct positions 0..S-1, or -1 for none. All heads share them.
        scale: factor on the scores, K**-0.5 by default.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype; zeros where a query lists no key. Differentiable in q, k and v.

    Raises:
        ValueError: the shapes do not fit one another.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: DeepSeek-V3.2, 2025, section 2.1, eq. 2.

    >>> import torch
    >>> q = k = torch.zeros(1, 3, 1, 2)  # equal scores: the mean over the listed values
    >>> v = torch.tensor([0.0, 2.0, 4.0]).view(1, 3, 1, 1)
    >>> sparse_attention(q, k, v, torch.tensor([[[0, -1], [0, 1], [0, 2]]])).flatten()
    tensor([0., 1., 2.])
    """
    batch, queries, heads, dim = q_BTHK.shape
    if k_BSGK.dim() != 4 or k_BSGK.shape[:3] != v_BSGV.shape[:3] or k_BSGK.shape[0] != batch:
        raise ValueError(f"sparse_attention: k and v must be [{batch}, S, G, *] with equal S and G; "
                         f"got {list(k_BSGK.shape)} and {list(v_BSGV.shape)}")
    if k_BSGK.shape[3] != dim or heads % k_BSGK.shape[2]:
        raise ValueError(f"sparse_attention: q {list(q_BTHK.shape)} does not fit k {list(k_BSGK.shape)}: "
                         "equal head dims and a multiple of the key heads are needed")
    if indices_BTN.dim() != 3 or indices_BTN.shape[:2] != (batch, queries) or indices_BTN.is_floating_point():
        raise ValueError(f"sparse_attention: indices must be integers [{batch}, {queries}, N]; "
                         f"got {indices_BTN.dtype} {list(indices_BTN.shape)}")
    check_indices("sparse_attention", "indices", indices_BTN, k_BSGK.shape[1], lowest=-1, distinct=True)
    chosen = choose(SPARSE_ATTENTION, Call.of(q_BTHK, k_BSGK, v_BSGV, key_dim=dim, value_dim=v_BSGV.shape[3]),
                    backend)
    return chosen.run(q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale)
