"""Ranges of keys that queries see, pieces of the queries, and their scores.

X rows of one key head (B * G), T queries, Q of a piece, R query heads of a key head, E keys, K key dim; M rows of a
piece (Q R), C keys that one of them sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm_kernels.precision import wide

CPU_PIECE_ELEMENTS = 2**18  # scores of a piece: they stay in the cache
GPU_PIECE_ELEMENTS = 2**26
MIN_QUERIES = 8  # of a piece


class Piece(NamedTuple):
    """Consecutive queries, and the keys that they see.

    Args:
        queries: the queries.
        keys: holds all keys that one of them sees.
        mixed: the parts of `keys` that not all of these queries see.
    """

    queries: slice
    keys: slice
    mixed: list[slice]


class Ranges:
    """Ranges of keys of queries, and pieces of consecutive queries.

    Args:
        first_BT: the first key of each query.
        count_BT: number of its keys.
    """

    def __init__(self, first_BT: Tensor, count_BT: Tensor):
        self.first_BT, self.last_BT = first_BT, first_BT + count_BT

    def exact(self) -> bool:
        """Whether the keys of a piece are found from the numbers of its ranges."""
        return self.first_BT.device.type == "cpu" and not torch.compiler.is_dynamo_compiling()

    def pieces(self, rows_of_heads: int, keys: int, queries: slice | None = None) -> Iterator[Piece]:
        """Pieces of the queries whose scores stay within the limit of the device; those that see no key are left out.

        On a CPU the keys of a piece are as few as can be. Elsewhere nothing waits for the device, and in a graph of
        torch.compile each piece makes it longer: the pieces are large there, and their keys are all keys.

        Args:
            rows_of_heads: number of scores of a query and a key, over all rows and heads.
            keys: E.
            queries: these alone.
        """
        exact = self.exact()
        most = CPU_PIECE_ELEMENTS if exact else GPU_PIECE_ELEMENTS
        size = max(MIN_QUERIES, most // max(1, rows_of_heads * keys))
        begin, end = (0, self.first_BT.shape[1]) if queries is None else (queries.start, queries.stop)
        for start in range(begin, end, size):
            rows = slice(start, min(start + size, end))
            if not exact:
                yield Piece(rows, slice(0, keys), [slice(0, keys)])
                continue
            first, last = self.first_BT[:, rows], self.last_BT[:, rows]
            some = last > first
            low, high = int(first.where(some, keys).min()), int(last.where(some, 0).max())
            all_from, all_to = int(first.max()), int(last.min())  # seen by all, if there are any
            mixed = [slice(low, all_from), slice(all_to, high)] if all_from < all_to else [slice(low, high)]
            if low < high:
                yield Piece(rows, slice(low, high), [part for part in mixed if part.start < part.stop])

    def hide(self, score_XMC: Tensor, piece: Piece, fill: float) -> None:
        """Fill in place what is not seen, in the keys that some queries of a piece see and some do not."""
        first_BQ1, last_BQ1 = (x[:, piece.queries, None] for x in (self.first_BT, self.last_BT))
        batch, queries = first_BQ1.shape[:2]
        score_BGQRC = score_XMC.view(batch, -1, queries, score_XMC.shape[1] // queries, score_XMC.shape[2])
        for keys in piece.mixed:
            key_C = torch.arange(keys.start, keys.stop, device=score_XMC.device)
            unseen_BQC = (key_C < first_BQ1) | (key_C >= last_BQ1)
            columns = slice(keys.start - piece.keys.start, keys.stop - piece.keys.start)
            score_BGQRC[..., columns].masked_fill_(unseen_BQC[:, None, :, None], fill)


def weigh(q_XTRK: Tensor, k_XEK: Tensor, ranges: Ranges, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials of the scores of a piece, relative to the largest one.

    Args:
        q_XTRK: queries.
        k_XEK: keys, in fp32 at least and times the factor of the scores.
        ranges: what the queries see.
        piece: some of them.

    Returns:
        Exponentials [X, M, C], their sums [X, M, 1], and the largest score [X, M, 1], 0 where nothing is seen.
    """
    p_XMC = torch.bmm(wide(q_XTRK[:, piece.queries]).flatten(1, 2), k_XEK[:, piece.keys].transpose(1, 2))
    ranges.hide(p_XMC, piece, -torch.inf)
    most_XM1 = p_XMC.amax(-1, keepdim=True)
    most_XM1.masked_fill_(most_XM1 == -torch.inf, 0.0)
    return p_XMC, p_XMC.sub_(most_XM1).exp_().sum(-1, keepdim=True), most_XM1
