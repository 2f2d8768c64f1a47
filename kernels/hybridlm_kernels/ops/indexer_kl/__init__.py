"""The loss that trains a sparse-attention indexer, and the recall of a selection of keys. Costs: README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, float16, float32, promote_types

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.index_checks import check_indices
from hybridlm_kernels.ops.indexer_kl import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import filled_borders_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend


def _fits(call: Call) -> tuple[bool, str]:
    if float16 in (call.dtype, call.get("main_dtype")):
        return False, "gradients at the scores are too small for float16; use bfloat16 or float32"
    widest = 320 if call.get("main_dtype") == float32 and not call.get("selected") else 576
    if call.get("main_dim") > widest or call.get("dim") > 256:
        return False, (f"holds index heads of up to 256 and {call.get('main_dtype')} heads of up to {widest} dims; got "
                       f"{call.get('dim')} and {call.get('main_dim')}")
    return True, ""


INDEXER_KL = register(Operation("indexer_kl", (
    lazy_triton_backend(f"{__name__}.triton_backend", "indexer_kl", _fits),
    Backend("torch", torch_backend.indexer_kl), Backend("reference", reference.indexer_kl))))
ATTENTION_RECALL = register(Operation("attention_recall", (
    Backend("torch", torch_backend.attention_recall), Backend("reference", reference.attention_recall))))


class Recall(NamedTuple):
    """Recall of a selection, in 0..1: means over the queries that see more keys than they list (1 if none does)."""

    mass: Tensor  # fraction of the dense attention, averaged over heads, that lies on the listed keys
    agreement: Tensor  # fraction of the listed keys that are among as many keys of most attention
    attainable: Tensor  # the mass that as many keys of most attention hold


class IndexerKL(NamedTuple):
    """Loss and entropy of an indexer: scalars, fp32 (fp64 for fp64 inputs). Only `loss` has a gradient."""

    loss: Tensor  # nats, mean over the queries that have a key
    entropy: Tensor  # of softmax(I), nats, mean over the same queries
    recall: Recall | None = None  # of `recall_of`


def empty_recall(x: Tensor) -> Recall:
    """Memory for a recall, in x's dtype but float32 at least."""
    return Recall(*[x.new_empty((), dtype=promote_types(x.dtype, float32)) for _ in range(3)])


def empty_kl(q_BTJI: Tensor, recall_of_BTN: Tensor | None) -> IndexerKL:
    """Memory for the results of the loss of an indexer."""
    loss, entropy = (q_BTJI.new_empty((), dtype=promote_types(q_BTJI.dtype, float32)) for _ in range(2))
    return IndexerKL(loss, entropy, None if recall_of_BTN is None else empty_recall(q_BTJI))


def _outputs(q_BTJI: Tensor, *_: Any, recall_of_BTN: Tensor | None = None, **__: Any) -> IndexerKL:
    return empty_kl(q_BTJI, recall_of_BTN)


@compilable(_outputs)
def indexer_kl(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor, *,
               indices_BTN: Tensor | None = None, recall_of_BTN: Tensor | None = None, scale: float | None = None,
               cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None, backend: str | None = None) -> IndexerKL:
    """The indexer's loss KL(p || softmax(I)): I_ts = sum_j w_tj relu(q_tj . k_s), p the main attention.

    p is averaged over heads. Both distributions are over the keys that a query sees, or over those listed for it. The
    gradient goes to q, k and w alone and is exact: softmax(I) - p at the scores.

    Args:
        q_BTJI: index queries [B, T, J, I], activated, the last T of S positions.
        k_BSI: index keys [B, S, I], activated.
        w_BTJ: weights of the index heads [B, T, J], activated, with the scales I**-0.5 and J**-0.5.
        main_q_BTHK: queries of the main attention [B, T, H, K], activated.
        main_k_BSGK: keys of the main attention [B, S, G, K], activated; query head h reads key head h // (H/G).
        indices_BTN: integers [B, T, N]: distinct visible positions 0..S-1, or -1 for none. None: all visible keys.
        recall_of_BTN: another such list, without `indices_BTN`: its `attention_recall`, from the same pass.
        scale: factor on the main scores, K**-0.5 by default.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*S keys.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        Loss and entropy in nats, means over the queries that have a key, and the recall of `recall_of_BTN`.

    Raises:
        ValueError: the shapes do not fit one another, or both lists are given.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: DeepSeek-V3.2, 2025, section 2.1, eq. 3 (all keys) and eq. 4 (selected keys).

    >>> import torch
    >>> q = w = torch.zeros(1, 2, 1, 1)
    >>> main_q = main_k = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    >>> result = indexer_kl(q, torch.zeros(1, 2, 1), w[..., 0], main_q, main_k)
    >>> f"{result.loss:.4f}", f"{result.entropy:.4f}"  # half of ln 2 - H(p of the second query), half of ln 2
    ('0.0555', '0.3466')
    """
    batch, queries, heads, dim = q_BTJI.shape
    if k_BSI.dim() != 3 or k_BSI.shape[0] != batch or k_BSI.shape[2] != dim or k_BSI.shape[1] < queries:
        raise ValueError(f"indexer_kl: k must be [{batch}, S >= {queries}, {dim}]; got {list(k_BSI.shape)}")
    if w_BTJ.shape != (batch, queries, heads):
        raise ValueError(f"indexer_kl: w must be {[batch, queries, heads]}; got {list(w_BTJ.shape)}")
    if indices_BTN is not None and recall_of_BTN is not None:
        raise ValueError("indexer_kl: recall_of needs the attention to all keys: pass it without indices")
    for index in (indices_BTN, recall_of_BTN):
        check_main("indexer_kl", main_q_BTHK, main_k_BSGK, index, (batch, queries, k_BSI.shape[1]))
    cu_seqlens = filled_borders_of(cu_seqlens, batch, k_BSI.shape[1], k_BSI.device)
    scale = main_q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    facts = {"selected": indices_BTN is not None, "dim": dim, "main_dim": main_q_BTHK.shape[3],
             "main_dtype": promote_types(main_q_BTHK.dtype, main_k_BSGK.dtype)}
    chosen = choose(INDEXER_KL, Call.of(q_BTJI, k_BSI, w_BTJ, **facts), backend)
    loss, entropy, *recall = chosen.run(q_BTJI, k_BSI, w_BTJ, main_q_BTHK.detach(), main_k_BSGK.detach(), indices_BTN,
                                        recall_of_BTN, scale, cu_seqlens)
    return IndexerKL(loss, entropy, None if recall_of_BTN is None else Recall(*recall))


@compilable(lambda main_q_BTHK, *_, **__: empty_recall(main_q_BTHK))
def attention_recall(main_q_BTHK: Tensor, main_k_BSGK: Tensor, indices_BTN: Tensor, *, scale: float | None = None,
                     cu_seqlens: CuSeqlens | Tensor | Sequence[int] | None = None,
                     backend: str | None = None) -> Recall:
    """The fraction of the dense attention that lies on the listed keys, beside the best attainable; without gradient.

    Args:
        main_q_BTHK: queries [B, T, H, K], activated, the last T of S positions.
        main_k_BSGK: keys [B, S, G, K], activated; query head h reads key head h // (H/G).
        indices_BTN: integers [B, T, N]: distinct visible positions 0..S-1, or -1 for none.
        scale: factor on the scores, K**-0.5 by default.
        cu_seqlens: cumulative lengths of packed documents over the flattened B*S keys.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        Mass, agreement and attainable mass, means over the queries that see more keys than they list.

    Raises:
        ValueError: the shapes do not fit one another.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    >>> import torch
    >>> q = k = torch.zeros(1, 2, 1, 4)
    >>> attention_recall(q, k, torch.tensor([[[0], [1]]])).mass  # one of two keys of equal attention
    tensor(0.5000)
    """
    batch, queries, keys = *main_q_BTHK.shape[:2], main_k_BSGK.shape[1]
    check_main("attention_recall", main_q_BTHK, main_k_BSGK, indices_BTN, (batch, queries, keys))
    cu_seqlens = filled_borders_of(cu_seqlens, batch, keys, main_k_BSGK.device)
    scale = main_q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose(ATTENTION_RECALL, Call.of(main_q_BTHK, main_k_BSGK), backend)
    return Recall(*chosen.run(main_q_BTHK.detach(), main_k_BSGK.detach(), indices_BTN, scale, cu_seqlens))


def check_main(name: str, q_BTHK: Tensor, k_BSGK: Tensor, indices_BTN: Tensor | None,
               shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless main queries, main keys and list fit `shape`: (rows, queries, keys)."""
    batch, queries, keys = shape
    if q_BTHK.dim() != 4 or q_BTHK.shape[:2] != (batch, queries):
        raise ValueError(f"{name}: main_q must be [{batch}, {queries}, H, K]; got {list(q_BTHK.shape)}")
    if (k_BSGK.dim() != 4 or k_BSGK.shape[:2] != (batch, keys) or k_BSGK.shape[3] != q_BTHK.shape[3]
            or q_BTHK.shape[2] % k_BSGK.shape[2] or keys < queries):
        raise ValueError(f"{name}: main_k must be [{batch}, {keys}, a divisor of {q_BTHK.shape[2]}, "
                         f"{q_BTHK.shape[3]}] with at least {queries} keys; got {list(k_BSGK.shape)}")
    if indices_BTN is not None and (indices_BTN.dim() != 3 or indices_BTN.shape[:2] != (batch, queries)
                                    or indices_BTN.is_floating_point()):
        raise ValueError(f"{name}: indices must be integers [{batch}, {queries}, N]; got {indices_BTN.dtype} "
                         f"{list(indices_BTN.shape)}")
    if indices_BTN is not None:
        check_indices(name, "indices", indices_BTN, keys, lowest=-1, distinct=True)
