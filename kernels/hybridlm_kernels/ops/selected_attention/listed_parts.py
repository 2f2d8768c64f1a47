"""The parts of one softmax: blocks that queries list, tokens that they list, and a window.

A part attends by itself and says the logarithm of its sum, by which parts are joined. It is made for one piece of
queries.

M queries, R heads, K/V key/value dim, N units per list, Z keys of all rows; A slots, a slot being a query that lists a
block of C tokens, P slots of a tile; X rows, Q queries of each, E queries of a band.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 64  # query heads of a tile: enough for a matrix product, few enough that little of it is padding
CPU_SCORES = 2**17  # scores of a block that are worked on at a time, in the cache
GPU_SCORES = 2**26
MIN_BAND, MAX_BAND = 32, 256  # queries of a band


def add_rows(total_ZD: Tensor, row: Tensor, x_AD: Tensor) -> None:
    """Adds x to total[row], in an order that never changes."""
    if total_ZD.device.type == "cpu":
        total_ZD.index_add_(0, row, x_AD)
    else:  # index_add_ would use atomics
        total_ZD += torch.ops.aten.embedding_dense_backward(x_AD.contiguous(), row, len(total_ZD), -1, False)


def weigh(score: Tensor) -> tuple[Tensor, Tensor]:
    """exp(score - most) in place of the scores, and the most of the last dimension; 0 for it where all are -inf."""
    most = score.amax(-1)
    most.masked_fill_(most == -torch.inf, 0.0)
    return score.sub_(most[..., None]).exp_(), most


class Gradients(NamedTuple):
    """Given to the backward of a piece: gradients of the outputs, do . o - dlse, and log sums (inf for -inf)."""

    do_MRV: Tensor
    delta_MR: Tensor
    lse_MR: Tensor


class AttentionPart(ABC):
    """Keys that take part in one softmax. `is_listed`: lists name them."""

    is_listed: ClassVar[bool] = True

    @abstractmethod
    def attend(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [M, R, V] of the part alone, and the logarithms of its sums [M, R]; zeros and -inf without keys.

        Args:
            q_MRK: scaled queries.
            k_ZK: keys of all rows.
            v_ZV: their values.
            bias_MN: added to the scores of a unit.
        """

    @abstractmethod
    def backward(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None, given: Gradients, dk: Tensor,
                 dv: Tensor) -> tuple[Tensor, Tensor | None]:
        """Adds the gradients of keys and values; returns those of the scaled queries [M, R, K] and biases [M, N]."""


class ListedBlocks(AttentionPart):
    """Pairs of a query and a block that it lists, sorted by block: a block's keys are read where they are, and all
    products are of matrices.

    Forward, a block's slots are cut into tiles of one size, so that a query's bits do not depend on how many others
    list the block. Of a block, the queries that do not read all of it come first.
    """

    def __init__(self, start_MN: Tensor, limit_MN: Tensor, block: int, heads: int, keys: int):
        """Sort the pairs.

        Args:
            start_MN: first token of each listed block, among all Z.
            limit_MN: offset of the last token of the block that the query reads; -1: none.
            block: tokens per block.
            heads: query heads R.
            keys: Z.
        """
        self.queries, self.units = start_MN.shape
        self.heads, self.block, self.keys = heads, block, keys
        self.tile_slots = size = max(1, TILE_ROWS // heads)
        device = start_MN.device
        present = limit_MN.flatten() >= 0
        whole = limit_MN.flatten() >= block - 1
        key = (2 * start_MN.flatten() + whole).masked_fill(~present, 2 * keys)
        order = torch.argsort(key, stable=True)[: int(present.sum())]
        start = start_MN.flatten()[order]
        blocks, counts = torch.unique_consecutive(start, return_counts=True)
        tiles = (counts + size - 1) // size
        first_slot = (tiles.cumsum(0) - tiles) * size
        shift = first_slot - (counts.cumsum(0) - counts)
        slot = torch.arange(len(order), device=device) + shift.repeat_interleave(counts)
        # One more empty slot serves the units that are not read.
        self.num_slots = int(tiles.sum()) * size + 1
        slot_X = torch.full((self.queries * self.units,), self.num_slots - 1, dtype=torch.int64, device=device)
        slot_X[order] = slot
        self.slot_MN = slot_X.view(self.queries, self.units)
        self.query_A = torch.zeros(self.num_slots, dtype=torch.int64, device=device)
        self.query_A[slot] = order // self.units
        self.limit_A = torch.full((self.num_slots,), block - 1, dtype=torch.int64, device=device)
        self.limit_A[slot] = limit_MN.flatten()[order]
        cut = torch.zeros(len(blocks), dtype=torch.int64, device=device).index_add_(
            0, torch.repeat_interleave(counts), (~whole[order]).long())
        #: of each block its first token, first slot, slots, and those of them that do not read all of it
        self.runs = torch.stack([blocks, first_slot, counts, cut], 1).tolist()
        self.offset_C = torch.arange(block, device=device)

    def _pieces(self, slots: int, multiple: int) -> Iterator[tuple[slice, slice, int]]:
        """Yields keys, slots (a multiple of some) and the number of the first slots that do not read all keys."""
        for token, first, count, cut in self.runs:
            keys = slice(token, min(token + self.block, self.keys))
            stop = first + -(-count // multiple) * multiple
            for begin in range(first, stop, slots):
                end = min(begin + slots, stop)
                yield keys, slice(begin, end), min(max(first + cut - begin, 0), end - begin)

    def _slots(self, device: torch.device, multiple: int) -> int:
        """Slots that are worked on at a time."""
        most = CPU_SCORES if device.type == "cpu" else GPU_SCORES
        return max(1, most // (self.heads * self.block * multiple)) * multiple

    def _rows(self, x_MRD: Tensor, slots: slice) -> Tensor:
        """Queries or gradients of outputs of some slots, [slots * R, D]."""
        return x_MRD.flatten(1).index_select(0, self.query_A[slots]).view(-1, x_MRD.shape[2])

    def _hide(self, score: Tensor, slots: slice, cut: int) -> None:
        """Puts -inf where the first `cut` slots do not read."""
        if cut:
            score_ARC = score.view(slots.stop - slots.start, self.heads, -1)
            limit_A = self.limit_A[slots.start : slots.start + cut]
            unread_AC = self.offset_C[: score_ARC.shape[2]] > limit_A[:, None]
            score_ARC[:cut].masked_fill_(unread_AC[:, None], -torch.inf)

    def _by_slot(self, x_MN: Tensor) -> Tensor:
        """Numbers of units, by slot; 0 for empty ones."""
        return x_MN.new_zeros(self.num_slots).index_copy_(0, self.slot_MN.flatten(), x_MN.flatten())

    def attend(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None) -> tuple[Tensor, Tensor]:
        o_ARV = q_MRK.new_empty(self.num_slots, self.heads, v_ZV.shape[1])
        o_ARV[-1] = 0.0
        most_AR, total_AR = (q_MRK.new_full((self.num_slots, self.heads), fill) for fill in (-torch.inf, 0.0))
        bias_A = None if bias_MN is None else self._by_slot(bias_MN)
        size = self.tile_slots
        for keys, slots, cut in self._pieces(self._slots(q_MRK.device, size), size):
            tiles = (slots.stop - slots.start) // size
            q_LXK = self._rows(q_MRK, slots).view(tiles, size * self.heads, -1)
            score = torch.bmm(q_LXK, k_ZK[keys].t().expand(tiles, -1, -1))
            if bias_A is not None:
                score.view(slots.stop - slots.start, -1).add_(bias_A[slots, None])
            self._hide(score, slots, cut)
            p, most = weigh(score)
            most_AR[slots], total_AR[slots] = most.view(-1, self.heads), p.sum(-1).view(-1, self.heads)
            torch.bmm(p, v_ZV[keys].expand(tiles, -1, -1), out=o_ARV[slots].view(tiles, size * self.heads, -1))
        most_MNR = most_AR[self.slot_MN]
        at_MR = most_MNR.amax(1)
        at_MR.masked_fill_(at_MR == -torch.inf, 0.0)
        weight_MNR = most_MNR.sub_(at_MR[:, None]).exp_()
        total_MR = torch.einsum("mnr,mnr->mr", weight_MNR, total_AR[self.slot_MN])
        weight_MNR /= total_MR.masked_fill(total_MR == 0, 1.0)[:, None]
        row_MRN = (self.slot_MN * self.heads)[:, None] + torch.arange(self.heads, device=q_MRK.device)[:, None]
        o = F.embedding_bag(row_MRN.flatten(0, 1), o_ARV.flatten(0, 1), mode="sum",
                            per_sample_weights=weight_MNR.transpose(1, 2).reshape(-1, self.units))
        return o.view(self.queries, self.heads, -1), total_MR.log_().add_(at_MR)

    def backward(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None, given: Gradients, dk: Tensor,
                 dv: Tensor) -> tuple[Tensor, Tensor | None]:
        dq_ARK = q_MRK.new_empty(self.num_slots, self.heads, q_MRK.shape[2])
        dq_ARK[-1] = 0.0
        bias_A = None if bias_MN is None else self._by_slot(bias_MN)
        d_bias_A = None if bias_A is None else torch.zeros_like(bias_A)
        for keys, slots, cut in self._pieces(self._slots(q_MRK.device, 1), 1):
            q, do = self._rows(q_MRK, slots), self._rows(given.do_MRV, slots)
            query = self.query_A[slots]
            shift = given.lse_MR[query]
            if bias_A is not None:
                shift -= bias_A[slots, None]
            p = torch.mm(q, k_ZK[keys].t()).sub_(shift.view(-1, 1))
            self._hide(p, slots, cut)
            p.exp_()
            dv[keys].addmm_(p.t(), do)
            ds = torch.mm(do, v_ZV[keys].t()).sub_(given.delta_MR[query].view(-1, 1)).mul_(p)
            dk[keys].addmm_(ds.t(), q)
            torch.mm(ds, k_ZK[keys], out=dq_ARK[slots].flatten(0, 1))
            if d_bias_A is not None:
                d_bias_A[slots] = ds.view(slots.stop - slots.start, -1).sum(1)
        dq = F.embedding_bag(self.slot_MN, dq_ARK.flatten(1), mode="sum").view(q_MRK.shape)
        return dq, None if d_bias_A is None else d_bias_A[self.slot_MN]


class GatheredTokens(AttentionPart):
    """A copy of the tokens that each query lists."""

    def __init__(self, token_MN: Tensor, absent_MN: Tensor):
        self.absent_MN = absent_MN
        self.token_MN = token_MN.masked_fill(absent_MN, 0)

    def _gather(self, x_ZD: Tensor) -> Tensor:
        """Keys or values by query, [M, N, D]."""
        return x_ZD.index_select(0, self.token_MN.flatten()).view(*self.token_MN.shape, x_ZD.shape[1])

    def _score(self, q_MRK: Tensor, k_MNK: Tensor, bias_MN: Tensor | None) -> Tensor:
        """Scores [M, R, N], -inf where nothing is listed."""
        score_MRN = torch.bmm(q_MRK, k_MNK.transpose(1, 2))
        if bias_MN is not None:
            score_MRN += bias_MN[:, None]
        return score_MRN.masked_fill_(self.absent_MN[:, None], -torch.inf)

    def attend(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None) -> tuple[Tensor, Tensor]:
        p_MRN, most_MR = weigh(self._score(q_MRK, self._gather(k_ZK), bias_MN))
        return normalized(torch.bmm(p_MRN, self._gather(v_ZV)), p_MRN.sum(-1), most_MR)

    def backward(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None, given: Gradients, dk: Tensor,
                 dv: Tensor) -> tuple[Tensor, Tensor | None]:
        k_MNK = self._gather(k_ZK)
        p_MRN = self._score(q_MRK, k_MNK, bias_MN).sub_(given.lse_MR[..., None]).exp_()
        ds_MRN = torch.bmm(given.do_MRV, self._gather(v_ZV).transpose(1, 2)).sub_(given.delta_MR[..., None])
        ds_MRN.mul_(p_MRN)
        token = self.token_MN.flatten()
        add_rows(dv, token, torch.bmm(p_MRN.transpose(1, 2), given.do_MRV).flatten(0, 1))
        add_rows(dk, token, torch.bmm(ds_MRN.transpose(1, 2), q_MRK).flatten(0, 1))
        return torch.bmm(ds_MRN, k_MNK), None if bias_MN is None else ds_MRN.sum(1)


def normalized(o_MRV: Tensor, total_MR: Tensor, most_MR: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs divided by their sums of weights, and the logarithms of the sums."""
    return o_MRV / total_MR.masked_fill(total_MR == 0, 1.0)[..., None], most_MR + total_MR.log()


class WindowBands(AttentionPart):
    """The window: bands of queries against all keys that one of them sees."""

    is_listed: ClassVar[bool] = False

    def __init__(self, k_FWK: Tensor, v_FWV: Tensor, key_row_X: Tensor, position_Q: Tensor, first_XQ: Tensor,
                 window: int, start: int):
        """Cut the queries into bands.

        Args:
            k_FWK: keys of all rows.
            v_FWV: values of all rows.
            key_row_X: the row of keys of each row.
            position_Q: positions of the queries in their rows.
            first_XQ: first token of each query's document.
            window: keys that a query sees, its own included.
            start: position of the first query.
        """
        self.k_FWK, self.v_FWV, self.key_row_X = k_FWK, v_FWV, key_row_X
        self.rows, self.size = first_XQ.shape
        self.bands = []
        step = min(MAX_BAND, max(MIN_BAND, window // 2))
        for begin in range(0, self.size, step):
            end = min(begin + step, self.size)
            keys = slice(max(0, start + begin - window + 1), start + end)
            s = torch.arange(keys.start, keys.stop, device=position_Q.device)
            t = position_Q[begin:end, None]
            seen_XES = (s <= t) & (s > t - window) & (s >= first_XQ[:, begin:end, None])
            self.bands.append((slice(begin, end), keys, ~seen_XES[:, None]))  # [X, 1, E, keys]

    def _rows(self, x_MRD: Tensor, queries: slice) -> Tensor:
        """Queries or gradients of outputs of a band, [X, R * E, D]."""
        return x_MRD.unflatten(0, (self.rows, self.size))[:, queries].transpose(1, 2).flatten(1, 2)

    def _join(self, bands: list[Tensor], heads: int) -> Tensor:
        """[X, R * E, ...] of each band to [M, R, ...]."""
        return torch.cat([band.unflatten(1, (heads, -1)).transpose(1, 2) for band in bands], 1).flatten(0, 1)

    def _score(self, q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
        """Scores of a band [X, R * E, keys], -inf outside of the window."""
        score = torch.bmm(q, k.transpose(1, 2))
        score.view(self.rows, -1, *hidden.shape[2:]).masked_fill_(hidden, -torch.inf)
        return score

    def attend(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, sums = [], []
        for queries, keys, hidden in self.bands:
            p, most = weigh(self._score(self._rows(q_MRK, queries), self.k_FWK[self.key_row_X, keys], hidden))
            o, lse = normalized(torch.bmm(p, self.v_FWV[self.key_row_X, keys]), p.sum(-1), most)
            outputs.append(o)
            sums.append(lse)
        return self._join(outputs, q_MRK.shape[1]), self._join(sums, q_MRK.shape[1])

    def backward(self, q_MRK: Tensor, k_ZK: Tensor, v_ZV: Tensor, bias_MN: Tensor | None, given: Gradients, dk: Tensor,
                 dv: Tensor) -> tuple[Tensor, Tensor | None]:
        found = []
        for queries, keys, hidden in self.bands:
            q, do = self._rows(q_MRK, queries), self._rows(given.do_MRV, queries)
            k, v = self.k_FWK[self.key_row_X, keys], self.v_FWV[self.key_row_X, keys]
            p = self._score(q, k, hidden).sub_(self._rows(given.lse_MR[..., None], queries)).exp_()
            ds = torch.bmm(do, v.transpose(1, 2)).sub_(self._rows(given.delta_MR[..., None], queries)).mul_(p)
            dv[:, keys].index_add_(0, self.key_row_X, torch.bmm(p.transpose(1, 2), do))
            dk[:, keys].index_add_(0, self.key_row_X, torch.bmm(ds.transpose(1, 2), q))
            found.append(torch.bmm(ds, k))
        return self._join(found, q_MRK.shape[1]), None
