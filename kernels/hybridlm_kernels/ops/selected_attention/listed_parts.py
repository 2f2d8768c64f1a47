"""The parts of one softmax: blocks that queries list, tokens that they list, and a window. Each knows its own scores.

A part gives scores in a shape of its own, and sums over them by query. It is made for one piece of queries.

M queries, R heads, K/V key/value dim, N units per list, Z keys of all rows; L tiles of P slots, a slot being a query
that lists the tile's block of C tokens; X rows, Q queries of each, E queries of a band.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 64  # query heads of a tile: enough for a matrix product, few enough that little of it is padding
MIN_BAND, MAX_BAND = 32, 256  # queries of a band


def add_rows(total_ZD: Tensor, row: Tensor, x_AD: Tensor) -> None:
    """Adds x to total[row], in an order that never changes."""
    if total_ZD.device.type == "cpu":
        total_ZD.index_add_(0, row, x_AD)
    else:  # index_add_ would use atomics
        total_ZD += torch.ops.aten.embedding_dense_backward(x_AD.contiguous(), row, len(total_ZD), -1, False)


class AttentionPart(ABC):
    """Keys that take part in one softmax, and the products with them. `is_listed`: lists name them."""

    is_listed: ClassVar[bool] = True

    @abstractmethod
    def score(self, q_MRK: Tensor, k_ZK: Tensor, bias_MN: Tensor | None) -> Tensor:
        """Scores with the bias of their unit, -inf where a key is not read, in a shape of the part's own."""

    @abstractmethod
    def most(self, score: Tensor) -> Tensor:
        """The largest score of each query, [M, R]."""

    @abstractmethod
    def weights(self, score: Tensor, at_MR: Tensor) -> Tensor:
        """exp(score - at), in place of the scores."""

    @abstractmethod
    def total(self, p: Tensor) -> Tensor:
        """The sum of the weights of each query, [M, R]."""

    @abstractmethod
    def output(self, p: Tensor, v_ZV: Tensor) -> Tensor:
        """The weighted sum of values of each query, [M, R, V]."""

    @abstractmethod
    def score_gradient(self, p: Tensor, do_MRV: Tensor, delta_MR: Tensor, v_ZV: Tensor) -> Tensor:
        """p (do . v - delta), in the shape of the scores."""

    @abstractmethod
    def backward(self, p: Tensor, ds: Tensor, q_MRK: Tensor, do_MRV: Tensor, k_ZK: Tensor, dk: Tensor,
                 dv: Tensor) -> Tensor:
        """Adds the gradients of keys and values; returns that of the scaled queries, [M, R, K]."""

    def bias_gradient(self, ds: Tensor) -> Tensor | None:
        """The gradient of the bias of each listed unit, [M, N]; None of a part without lists."""
        return None


class BlockTiles(AttentionPart):
    """Pairs of a query and a block that it lists, sorted by block and cut into tiles of one block each.

    So a block's keys are read once per tile, not once per query, and all products are of matrices.
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
        self.heads, self.block = heads, block
        self.slots_per_tile = size = max(1, TILE_ROWS // heads)
        device = start_MN.device
        present = limit_MN.flatten() >= 0
        key = start_MN.flatten().masked_fill(~present, keys)
        order = torch.argsort(key, stable=True)[: int(present.sum())]
        key = key[order]
        blocks, counts = torch.unique_consecutive(key, return_counts=True)
        tiles = (counts + size - 1) // size
        first_slot = (tiles.cumsum(0) - tiles) * size
        first_pair = counts.cumsum(0) - counts
        shift = (first_slot - first_pair).repeat_interleave(counts)
        slot = torch.arange(len(key), device=device) + shift
        # One more tile of empty slots; the last of them serves units that are not read.
        self.num_slots = (int(tiles.sum()) + 1) * size
        slot_X = torch.full((self.queries * self.units,), self.num_slots - 1, dtype=torch.int64, device=device)
        slot_X[order] = slot
        self.slot_MN = slot_X.view(self.queries, self.units)
        self.query_A = torch.zeros(self.num_slots, dtype=torch.int64, device=device)
        self.query_A[slot] = order // self.units
        limit_A = torch.full((self.num_slots,), -1, dtype=torch.int64, device=device)
        limit_A[slot] = limit_MN.flatten()[order]
        self.partial = (limit_A < block - 1).nonzero()[:, 0]  # slots that do not read their whole block
        self.unread = torch.arange(block, device=device) > limit_A[self.partial][:, None]
        token_LC = F.pad(blocks.repeat_interleave(tiles), (0, 1))[:, None] + torch.arange(block, device=device)
        self.token_LC = token_LC.clamp_(max=keys - 1)
        self.gathered: dict[int, Tensor] = {}  # what this piece has gathered, by its source

    def _gather(self, x: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Rows of x, gathered once per piece."""
        if id(x) not in self.gathered:
            self.gathered[id(x)] = x.flatten(1).index_select(0, index).view(shape)
        return self.gathered[id(x)]

    def _rows(self, x_MRD: Tensor) -> Tensor:
        """Queries or gradients of outputs by tile, [L, P * R, D]; empty slots get some query, and no weight."""
        return self._gather(x_MRD, self.query_A, (len(self.token_LC), self.slots_per_tile * self.heads, x_MRD.shape[2]))

    def _keys(self, x_ZD: Tensor) -> Tensor:
        """Keys or values by tile, [L, C, D]."""
        return self._gather(x_ZD, self.token_LC.flatten(), (*self.token_LC.shape, x_ZD.shape[1]))

    def _sum(self, x_AD: Tensor) -> Tensor:
        """The sum over each query's slots, [M, D]."""
        return F.embedding_bag(self.slot_MN, x_AD, mode="sum")

    def _tiles(self, x_ARC: Tensor) -> Tensor:
        return x_ARC.view(len(self.token_LC), self.slots_per_tile * self.heads, self.block)

    def score(self, q_MRK: Tensor, k_ZK: Tensor, bias_MN: Tensor | None) -> Tensor:
        """Scores [A, R, C], -inf where a slot does not read."""
        score = torch.bmm(self._rows(q_MRK), self._keys(k_ZK).transpose(1, 2))
        score_ARC = score.view(self.num_slots, self.heads, self.block)
        if bias_MN is not None:
            bias_A = bias_MN.new_zeros(self.num_slots).index_copy_(0, self.slot_MN.flatten(), bias_MN.flatten())
            score_ARC += bias_A[:, None, None]
        score_ARC[self.partial] = score_ARC[self.partial].masked_fill_(self.unread[:, None], -torch.inf)
        return score_ARC

    def most(self, score_ARC: Tensor) -> Tensor:
        return score_ARC.amax(-1)[self.slot_MN].amax(1)

    def weights(self, score_ARC: Tensor, at_MR: Tensor) -> Tensor:
        return score_ARC.sub_(at_MR[self.query_A][..., None]).exp_()

    def total(self, p_ARC: Tensor) -> Tensor:
        return self._sum(p_ARC.sum(-1))

    def output(self, p_ARC: Tensor, v_ZV: Tensor) -> Tensor:
        o = torch.bmm(self._tiles(p_ARC), self._keys(v_ZV))
        return self._sum(o.view(self.num_slots, self.heads * o.shape[2])).view(self.queries, self.heads, -1)

    def score_gradient(self, p_ARC: Tensor, do_MRV: Tensor, delta_MR: Tensor, v_ZV: Tensor) -> Tensor:
        dp = torch.bmm(self._rows(do_MRV), self._keys(v_ZV).transpose(1, 2)).view(p_ARC.shape)
        return dp.sub_(delta_MR[self.query_A][..., None]).mul_(p_ARC)

    def backward(self, p_ARC: Tensor, ds_ARC: Tensor, q_MRK: Tensor, do_MRV: Tensor, k_ZK: Tensor, dk: Tensor,
                 dv: Tensor) -> Tensor:
        token = self.token_LC.flatten()
        p, ds = self._tiles(p_ARC), self._tiles(ds_ARC)
        add_rows(dv, token, torch.bmm(p.transpose(1, 2), self._rows(do_MRV)).flatten(0, 1))
        add_rows(dk, token, torch.bmm(ds.transpose(1, 2), self._rows(q_MRK)).flatten(0, 1))
        dq = torch.bmm(ds, self._keys(k_ZK)).view(self.num_slots, self.heads * q_MRK.shape[2])
        return self._sum(dq).view(q_MRK.shape)

    def bias_gradient(self, ds_ARC: Tensor) -> Tensor:
        return ds_ARC.sum((1, 2))[self.slot_MN]


class GatheredTokens(AttentionPart):
    """A copy of the tokens that each query lists."""

    def __init__(self, token_MN: Tensor, absent_MN: Tensor):
        self.absent_MN = absent_MN
        self.token_MN = token_MN.masked_fill(absent_MN, 0)

    def _gather(self, x_ZD: Tensor) -> Tensor:
        """Keys or values by query, [M, N, D]."""
        return x_ZD.index_select(0, self.token_MN.flatten()).view(*self.token_MN.shape, x_ZD.shape[1])

    def score(self, q_MRK: Tensor, k_ZK: Tensor, bias_MN: Tensor | None) -> Tensor:
        """Scores [M, R, N], -inf where nothing is listed."""
        score_MRN = torch.bmm(q_MRK, self._gather(k_ZK).transpose(1, 2))
        if bias_MN is not None:
            score_MRN += bias_MN[:, None]
        return score_MRN.masked_fill_(self.absent_MN[:, None], -torch.inf)

    def most(self, score_MRN: Tensor) -> Tensor:
        return score_MRN.amax(-1)

    def weights(self, score_MRN: Tensor, at_MR: Tensor) -> Tensor:
        return score_MRN.sub_(at_MR[..., None]).exp_()

    def total(self, p_MRN: Tensor) -> Tensor:
        return p_MRN.sum(-1)

    def output(self, p_MRN: Tensor, v_ZV: Tensor) -> Tensor:
        return torch.bmm(p_MRN, self._gather(v_ZV))

    def score_gradient(self, p_MRN: Tensor, do_MRV: Tensor, delta_MR: Tensor, v_ZV: Tensor) -> Tensor:
        return torch.bmm(do_MRV, self._gather(v_ZV).transpose(1, 2)).sub_(delta_MR[..., None]).mul_(p_MRN)

    def backward(self, p_MRN: Tensor, ds_MRN: Tensor, q_MRK: Tensor, do_MRV: Tensor, k_ZK: Tensor, dk: Tensor,
                 dv: Tensor) -> Tensor:
        token = self.token_MN.flatten()
        add_rows(dv, token, torch.bmm(p_MRN.transpose(1, 2), do_MRV).flatten(0, 1))
        add_rows(dk, token, torch.bmm(ds_MRN.transpose(1, 2), q_MRK).flatten(0, 1))
        return torch.bmm(ds_MRN, self._gather(k_ZK))

    def bias_gradient(self, ds_MRN: Tensor) -> Tensor:
        return ds_MRN.sum(1)


class WindowBands(AttentionPart):
    """The window: bands of queries against all keys that one of them sees.

    Scores of the bands lie behind one another, [X, R * E, keys of the band] flattened.
    """

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
        self.bands, self.hidden = [], []
        step = min(MAX_BAND, max(MIN_BAND, window // 2))
        for begin in range(0, self.size, step):
            end = min(begin + step, self.size)
            keys = slice(max(0, start + begin - window + 1), start + end)
            self.bands.append((slice(begin, end), keys))
            s = torch.arange(keys.start, keys.stop, device=position_Q.device)
            t = position_Q[begin:end, None]
            seen_XES = (s <= t) & (s > t - window) & (s >= first_XQ[:, begin:end, None])
            self.hidden.append(~seen_XES[:, None])  # [X, 1, E, keys]

    def _rows(self, x_MRD: Tensor, queries: slice) -> Tensor:
        """Queries or gradients of outputs of a band, [X, R * E, D]."""
        return x_MRD.unflatten(0, (self.rows, self.size))[:, queries].transpose(1, 2).flatten(1, 2)

    def _cut(self, x: Tensor) -> list[Tensor]:
        """Scores by band, each [X, R, E, keys], views of x."""
        heads = x.numel() // sum(hidden.numel() for hidden in self.hidden)
        parts = x.split([hidden.numel() * heads for hidden in self.hidden])
        return [part.view(self.rows, heads, *hidden.shape[2:]) for part, hidden in zip(parts, self.hidden, strict=True)]

    def _join(self, bands: list[Tensor]) -> Tensor:
        """[X, R, E, ...] of each band to [M, R, ...]."""
        return torch.cat([band.transpose(1, 2) for band in bands], 1).flatten(0, 1)

    def _products(self, x_MRD: Tensor, y_FWD: Tensor) -> list[Tensor]:
        """x . y of each band, [X, R, E, keys]."""
        found = []
        for queries, keys in self.bands:
            product = torch.bmm(self._rows(x_MRD, queries), y_FWD[self.key_row_X, keys].transpose(1, 2))
            found.append(product.view(self.rows, x_MRD.shape[1], queries.stop - queries.start, -1))
        return found

    def _applied(self, x: Tensor, y_FWD: Tensor) -> Tensor:
        """The sum over keys of x times y, [M, R, D]."""
        return self._join([torch.matmul(band, y_FWD[self.key_row_X, keys][:, None])
                           for band, (_, keys) in zip(self._cut(x), self.bands, strict=True)])

    def score(self, q_MRK: Tensor, k_ZK: Tensor, bias_MN: Tensor | None) -> Tensor:
        """Scores of all bands, -inf where a key is outside of the window."""
        bands = [score.masked_fill_(hidden, -torch.inf)
                 for score, hidden in zip(self._products(q_MRK, self.k_FWK), self.hidden, strict=True)]
        return torch.cat([band.flatten() for band in bands])

    def most(self, score: Tensor) -> Tensor:
        return self._join([band.amax(-1) for band in self._cut(score)])

    def weights(self, score: Tensor, at_MR: Tensor) -> Tensor:
        for band, (queries, _) in zip(self._cut(score), self.bands, strict=True):
            at = self._rows(at_MR[..., None], queries).view(*band.shape[:3], 1)
            band.sub_(at).exp_()
        return score

    def total(self, p: Tensor) -> Tensor:
        return self._join([band.sum(-1) for band in self._cut(p)])

    def output(self, p: Tensor, v_ZV: Tensor) -> Tensor:
        return self._applied(p, self.v_FWV)

    def score_gradient(self, p: Tensor, do_MRV: Tensor, delta_MR: Tensor, v_ZV: Tensor) -> Tensor:
        dp = torch.cat([band.flatten() for band in self._products(do_MRV, self.v_FWV)])
        for band, (queries, _) in zip(self._cut(dp), self.bands, strict=True):
            band.sub_(self._rows(delta_MR[..., None], queries).view(*band.shape[:3], 1))
        return dp.mul_(p)

    def backward(self, p: Tensor, ds: Tensor, q_MRK: Tensor, do_MRV: Tensor, k_ZK: Tensor, dk: Tensor,
                 dv: Tensor) -> Tensor:
        pieces = zip(self._cut(p), self._cut(ds), self.bands, strict=True)
        for p_XRES, ds_XRES, (queries, keys) in pieces:
            band_dv = torch.bmm(p_XRES.flatten(1, 2).transpose(1, 2), self._rows(do_MRV, queries))
            band_dk = torch.bmm(ds_XRES.flatten(1, 2).transpose(1, 2), self._rows(q_MRK, queries))
            dv[:, keys].index_add_(0, self.key_row_X, band_dv)
            dk[:, keys].index_add_(0, self.key_row_X, band_dk)
        return self._applied(ds, self.k_FWK)
