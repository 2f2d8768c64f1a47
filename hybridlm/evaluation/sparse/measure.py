"""Runs a model with sparse attention in its softmax layers, and counts what its queries read.

B rows, T tokens, S keys, H query heads, G key/value heads, R = H/G, K/V key/value dim, Q queries of a piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridlm.evaluation.sparse.block_map import repeat_heads
from hybridlm.evaluation.sparse.contract import KeyReader, SparseMethod, visible_keys
from hybridlm.evaluation.sparse.rectification import rectified, require_attention_alone, two_streams
from hybridlm.model.mixers.common.dense_attention import AttentionCall, replaced_attention
from hybridlm.model.model import HybridLM
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide

PIECE_ELEMENTS = 2**22  # scores of a piece of queries


@dataclass
class SparseTally:
    """Counts over the queries that a method decides about, each query head for itself.

    Args:
        queries: number of queries.
        mass: sum of the shares of dense attention on the keys that are read, over all keys without sinks.
        read: number of keys that are read.
        visible: number of keys that dense attention reads.
        layers: softmax layers of the model that were sparse, and all of them.
    """

    queries: int = 0
    mass: float = 0.0
    read: int = 0
    visible: int = 0
    layers: tuple[int, int] = (0, 0)
    calls: int = field(default=0, repr=False)  # softmax layers of this forward so far

    def to_dict(self) -> dict[str, float | int | None]:
        """Means per query and head, as plain data; None where no query was sparse."""
        if not self.queries:
            return {"recall": None, "keys_read": None, "keys_visible": None, "sparse_layers": self.layers[0],
                    "softmax_layers": self.layers[1]}
        return {"recall": self.mass / self.queries, "keys_read": self.read / self.queries,
                "keys_visible": self.visible / self.queries, "sparse_layers": self.layers[0],
                "softmax_layers": self.layers[1]}


@contextmanager
def sparse_softmax(model: HybridLM, method: SparseMethod | None) -> Iterator[SparseTally]:
    """Context in which forwards of the model read keys by `method` in their softmax layers; all with None.

    Layers that attend to everything or to a window change; recurrent layers, and those that are sparse by themselves,
    stay as they are. Forwards only, without a decode state: a document is computed as a whole.

    Args:
        model: the model.
        method: the method; None counts the softmax layers and what they read, and changes nothing but the order of
            sums.

    Raises:
        ConfigError: the method replaces keys and values, and the model keeps other states too.
    """
    tally = SparseTally()
    every = 0 if method is None else method.rectified_every()
    if every:
        require_attention_alone(model)

    def begin(*_: object) -> None:
        tally.calls = 0

    def attend(call: AttentionCall) -> Tensor:
        layer = tally.calls
        tally.calls += 1
        chosen = method if method is not None and layer >= method.dense_layers else None
        sparse = 0 if chosen is None else layer + 1 - chosen.dense_layers
        tally.layers = (max(tally.layers[0], sparse), max(tally.layers[1], layer + 1))
        return _attend(call, chosen, tally) if every == 0 else _attend_rectified(call, chosen, tally, every)

    hook = model.register_forward_pre_hook(begin)
    try:
        with two_streams(model) if every else nullcontext(), replaced_attention(attend):
            yield tally
    finally:
        hook.remove()


@torch.no_grad()
def _attend(call: AttentionCall, method: SparseMethod | None, tally: SparseTally) -> Tensor:
    """Attention of all documents of the rows, one after the other."""
    batch, queries = call.q_BTHK.shape[:2]
    out = torch.empty(*call.q_BTHK.shape[:3], call.v_BSGV.shape[3], dtype=call.v_BSGV.dtype, device=call.q_BTHK.device)
    for row in range(batch):
        for start, stop in documents_of_row(call.cu_seqlens, row, queries):
            q, k, v = (wide(x[row, start:stop]) for x in (call.q_BTHK, call.k_BSGK, call.v_BSGV))
            out[row, start:stop] = _document(q, k, v, call, method, tally).to(out.dtype)
    return out


@torch.no_grad()
def _attend_rectified(call: AttentionCall, method: SparseMethod | None, tally: SparseTally, every: int) -> Tensor:
    """Attention of two streams: the first half of the rows is dense, the second one reads its keys too."""
    out = _attend(call, None, tally)
    batch, tokens = call.q_BTHK.shape[0] // 2, call.q_BTHK.shape[1]
    for row in range(batch):
        for start, stop in documents_of_row(call.cu_seqlens, row, tokens):
            q, k, v = (wide(x[batch + row, start:stop]) for x in (call.q_BTHK, call.k_BSGK, call.v_BSGV))
            dense_k, dense_v = (wide(x[row, start:stop]) for x in (call.k_BSGK, call.v_BSGV))
            for begin in range(0, stop - start, every):
                end = min(begin + every, stop - start)
                keys, values = (rectified(own[:end], dense[:end], begin) for own, dense in ((k, dense_k), (v, dense_v)))
                found = _document(q[:end], keys, values, call, method, tally, begin)
                out[batch + row, start + begin : start + end] = found.to(out.dtype)
    return out


def documents_of_row(borders: CuSeqlens | None, row: int, length: int) -> list[tuple[int, int]]:
    """List the first token and the end of each document of a row, counted from the row's start.

    >>> documents_of_row(CuSeqlens([0, 3, 5, 6, 10]), 1, 5)
    [(0, 1), (1, 5)]
    """
    if borders is None:
        return [(0, length)]
    begin = row * length
    return [(start - begin, stop - begin) for start, stop in itertools.pairwise(borders.host)
            if begin <= start < stop <= begin + length]


def _document(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, call: AttentionCall, method: SparseMethod | None,
              tally: SparseTally, begin: int = 0) -> Tensor:
    """Attention [Q, H, V] of the queries from `begin` on."""
    tokens, heads = q_THK.shape[:2]
    reader: KeyReader | None = None if method is None else method.reader(q_THK, k_TGK, call.scale, call.window)
    cut = None if method is None else method.piece_length(tokens)
    s_T = torch.arange(tokens, device=q_THK.device)
    k_HTK, v_HTV = (repeat_heads(x, heads) for x in (k_TGK, v_TGV))
    found = []
    for rows in _pieces(begin, tokens, max(8, PIECE_ELEMENTS // (heads * tokens)), cut):
        seen_QT = visible_keys(rows, tokens, call.window, q_THK.device)
        score_HQT = torch.einsum("qhk,htk->hqt", q_THK[rows], k_HTK) * call.scale
        score_HQT = score_HQT.masked_fill(~seen_QT, -torch.inf)
        reads_HQT = None if reader is None else reader.reads(rows, score_HQT)
        if reads_HQT is not None:
            reads_HQT = (reads_HQT | (s_T == s_T[rows, None])) & seen_QT
            tally.queries += score_HQT.shape[0] * score_HQT.shape[1]
            tally.mass += float((score_HQT.softmax(-1) * reads_HQT).sum())
            tally.read += int(reads_HQT.sum())
            tally.visible += int(seen_QT.sum()) * heads
            score_HQT = score_HQT.masked_fill(~reads_HQT, -torch.inf)
            correction_HQT = None if reader is None else reader.correction(rows)
            score_HQT = score_HQT if correction_HQT is None else score_HQT + correction_HQT
        if call.sinks_H is not None:
            sink_HQ1 = call.sinks_H.to(score_HQT.dtype)[:, None, None].expand(*score_HQT.shape[:2], 1)
            score_HQT = torch.cat([score_HQT, sink_HQ1], -1)
        found.append(torch.einsum("hqt,htv->qhv", score_HQT.softmax(-1)[..., :tokens], v_HTV))
    return torch.cat(found)


def _pieces(begin: int, tokens: int, size: int, cut: int | None) -> Iterator[slice]:
    """Yields pieces of at most `size` queries from `begin` on, none of which crosses `cut`."""
    borders = sorted({begin, tokens, *([] if cut is None else [min(max(begin, cut), tokens)])})
    for begin, end in itertools.pairwise(borders):
        for start in range(begin, end, size):
            yield slice(start, min(start + size, end))
