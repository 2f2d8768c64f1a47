"""Recall of indexers by layer and by position, beside what needs no indexer: random keys, a window, the first token.

Recall is the share of the dense attention, averaged over heads, on the keys that a query reads. Only queries that see
more keys than are selected count: the others read everything, however bad the indexer is.
B rows, T tokens of a document, H query heads, G key/value heads, K head dim, Q queries of a piece, N selected keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridlm.data.packing import Batch
from hybridlm.errors import ConfigError
from hybridlm.evaluation.sparse.block_map import repeat_heads
from hybridlm.evaluation.sparse.measure import PIECE_ELEMENTS, documents_of_row
from hybridlm.model.layer_stack import run_label
from hybridlm.model.mixers.common.indexed_attention import ObservedSelection, indexed_mixers
from hybridlm.model.model import HybridLM
from hybridlm.training.sparse_attention import measuring_recall
from hybridlm_kernels.precision import wide

# Shares of the attention: on the indexer's keys, on the best keys, on the newest, on the newest but one and the first,
# on the first alone, and the mean over all random choices; each of as many keys as the indexer's.
MEASURES = ("recall", "attainable", "window", "window_first", "first", "random")


@dataclass
class _LayerSums:
    """Sums over the queries of a layer that reads `topk` keys, by bucket of their position."""

    topk: int
    kl: float = 0.0
    tokens: int = 0
    totals: dict[int, Tensor] = field(default_factory=dict)  # by number of the bucket: sums of MEASURES, then the count


@torch.no_grad()
def indexer_recall(model: HybridLM, batches: Iterable[Batch]) -> dict[str, Any]:
    """Measure the selections of all indexers against dense attention, by layer and by position.

    The attention is that of the model in its present mode: with `sparse`, of a stream that sparse layers have made.

    Args:
        model: a model with indexers; it is measured in evaluation mode.
        batches: held-out text.

    Returns:
        `layers`, each with its index, `topk`, the KL of the indexer in nats and the shares `MEASURES`, also
        `by_position`: a bucket holds queries with `start` up to, not including, `stop` tokens before them in their
        document, powers of 2 times the least `topk` of all layers; `mean`, the same over all layers. Shares are None
        where no query sees more keys than it reads.

    Raises:
        ConfigError: the model has no indexer, or only selectors of blocks or compressed entries, which are no keys.
    """
    mixers = indexed_mixers(model.layers)
    if not mixers:
        raise _no_indexer(model)
    layers: dict[int, _LayerSums] = {}
    topk = 0  # of a layer without an indexer of its own: that of the layer whose selection it shares
    for mixer in mixers:
        topk = topk if mixer.indexer is None else mixer.indexer.topk
        layers[mixer.layer_index] = _LayerSums(topk)
    first = min(sums.topk for sums in layers.values())
    labels = {layer: [run_label(*run) for run in model.runs if run[0] == layer] for layer in layers}

    def observe(selection: ObservedSelection) -> None:
        _add(layers[selection.layer].totals, selection, first)

    was_training = model.training
    model.eval()
    try:
        with measuring_recall(model), _observed(model, observe):
            for batch in batches:
                moved = batch.to(model.device)
                stats = model(moved.input_ids, cu_seqlens=moved.cu_seqlens, logits_to_keep=1).stats
                for layer, sums in layers.items():
                    of_runs = [float(stats[f"indexer_kl/{label}"]) for label in labels[layer]]
                    sums.kl += sum(of_runs) / len(of_runs) * batch.num_text_tokens
                    sums.tokens += batch.num_text_tokens
    finally:
        model.train(was_training)
    rows = [{"layer": layer, "topk": sums.topk, "kl": sums.kl / max(sums.tokens, 1), **_describe(sums.totals, first)}
            for layer, sums in layers.items()]
    together: dict[int, Tensor] = {}
    for sums in layers.values():
        for bucket, total in sums.totals.items():
            together[bucket] = together.get(bucket, 0) + total
    return {"layers": rows,
            "mean": {"kl": sum(row["kl"] for row in rows) / len(rows), **_describe(together, first)}}


def _no_indexer(model: HybridLM) -> ConfigError:
    """The error for a model whose indexers select no keys, or that has none."""
    layers = dict.fromkeys(model.config.layers())
    selecting = [name for name in layers if model.config.mixers[name].has_selector()]
    if selecting:
        return ConfigError("--indexers", "the selectors of the model choose blocks or compressed entries, not keys",
                           got=", ".join(selecting), expected="layers whose indexer selects keys")
    return ConfigError("--indexers", "the model has no indexer", got=", ".join(layers),
                       expected="layers with an indexer", hint="recipe=dsa_tiny init_from=CHECKPOINT adds them")


@contextmanager
def _observed(model: HybridLM, observe: Any) -> Iterator[None]:
    mixers = indexed_mixers(model.layers)
    try:
        for mixer in mixers:
            mixer.selection_observer = observe
        yield
    finally:
        for mixer in mixers:
            mixer.selection_observer = None


def _describe(totals: dict[int, Tensor], first: int) -> dict[str, Any]:
    """Means over all queries, and by position; the first bucket starts at `first` tokens."""
    buckets = [{"start": first * 2**bucket, "stop": first * 2 ** (bucket + 1), **_means(totals[bucket])}
               for bucket in sorted(totals)]
    return {**_means(sum(totals.values(), torch.zeros(len(MEASURES) + 1, dtype=torch.float64))), "by_position": buckets}


def _means(total: Tensor) -> dict[str, float | int | None]:
    *sums, count = total.tolist()
    return {"queries": int(count), **{name: value / count if count else None
                                      for name, value in zip(MEASURES, sums, strict=True)}}


def _add(totals: dict[int, Tensor], selection: ObservedSelection, first: int) -> None:
    """Add the queries of a layer that see more keys than they read, by the bucket of their position.

    With pools a query may read fewer keys than `first`, and lie before the first bucket: it counts there.
    """
    length = selection.q_BTHK.shape[1]
    for row in range(len(selection.q_BTHK)):
        for start, stop in documents_of_row(selection.borders, row, length):
            q, k = (wide(x[row, start:stop]) for x in (selection.q_BTHK, selection.k_BSGK))
            chosen_TN = selection.chosen_BTN[row, start:stop].long()
            chosen_TN = torch.where(chosen_TN < 0, -1, chosen_TN - start)
            for t_Q, shares_QM in _shares(q, k, chosen_TN, selection.scale):
                bucket_Q = (t_Q.clamp(min=first).double() / first).log2().floor().long()
                for bucket in bucket_Q.unique().tolist():
                    here = shares_QM[bucket_Q == bucket]
                    total = torch.cat([here.sum(0), here.new_tensor([len(here)])]).cpu()
                    totals[bucket] = totals.get(bucket, torch.zeros_like(total)) + total


def _shares(q_THK: Tensor, k_TGK: Tensor, chosen_TN: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for pieces of the queries of a document that count, their positions and the shares MEASURES [Q, M]."""
    tokens, heads = q_THK.shape[:2]
    k_HTK = repeat_heads(k_TGK, heads)
    s_T = torch.arange(tokens, device=q_THK.device)
    listed_T = (chosen_TN >= 0).sum(-1)
    counted = (s_T + 1 > listed_T).nonzero()[:, 0]
    for t_Q in counted.split(max(8, PIECE_ELEMENTS // (heads * tokens))) if len(counted) else ():
        score_HQT = torch.einsum("qhk,htk->hqt", q_THK[t_Q], k_HTK) * scale
        p_QT = score_HQT.masked_fill_(s_T > t_Q[:, None], -torch.inf).softmax(-1).mean(0).double()
        n_Q1, t_Q1 = listed_T[t_Q, None], t_Q[:, None]
        up_to_QT = p_QT.cumsum(-1)
        best_QN = p_QT.topk(int(n_Q1.max()), -1).values.cumsum(-1)
        chosen_QN = chosen_TN[t_Q]
        recall_Q = (p_QT.gather(1, chosen_QN.clamp(min=0)) * (chosen_QN >= 0)).sum(-1)
        first_Q = p_QT[:, 0]
        # The last n keys of t + 1 are those behind key t - n; with n < t + 1 there is such a key.
        window_Q = 1 - up_to_QT.gather(1, t_Q1 - n_Q1)[:, 0]
        window_first_Q = 1 - up_to_QT.gather(1, t_Q1 - n_Q1 + 1)[:, 0] + first_Q
        yield t_Q, torch.stack([recall_Q, best_QN.gather(1, n_Q1 - 1)[:, 0], window_Q, window_first_Q, first_Q,
                                (n_Q1 / (t_Q1 + 1.0))[:, 0].double()], -1)
