"""Terms that a selector adds to the scores of selected blocks, through which it learns from the model's loss.

B rows, T queries, Q queries of a piece, S keys, H query heads, G key/value heads, R = H/G, K head dim, P blocks,
N blocks per list, L tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import selected_attention
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

PIECE_ELEMENTS = 2**20  # numbers of a piece of queries


def bias_in_pieces(make: Callable[..., Tensor], by_query: tuple[Tensor, ...], whole: tuple[Tensor, ...],
                   per_query: int) -> Tensor:
    """Compute a bias [B, T, H, N] piece by piece of queries, each again in the backward.

    Args:
        make: returns the bias of a piece from the slice of its queries, the pieces of `by_query`, and `whole`.
        by_query: tensors [B, T, ...].
        whole: tensors that every piece reads.
        per_query: numbers of one query of a row that are in memory at once.
    """
    batch, queries = by_query[0].shape[:2]
    size, found = max(8, PIECE_ELEMENTS // max(1, batch * per_query)), []
    for start in range(0, queries, size):
        rows = slice(start, min(start + size, queries))

        def piece(*tensors: Tensor, rows: slice = rows) -> Tensor:
            with torch.autocast(tensors[0].device.type, enabled=False):
                return make(rows, *tensors)

        inputs = (*(x[:, rows] for x in by_query), *whole)
        found.append(piece(*inputs) if torch.compiler.is_dynamo_compiling() else recomputed(piece, *inputs))
    return torch.cat(found, 1)


def listed_values(value_BQHP: Tensor, chosen_BQHN: Tensor, blocks: EntryWindows, rows: slice) -> Tensor:
    """Values of the listed blocks [B, Q, H, N]; zeros where none is listed, and for blocks that are not complete."""
    inside = is_complete(chosen_BQHN, blocks, rows)
    place = (chosen_BQHN + blocks.first_BT[:, rows, None, None]).masked_fill(~inside, 0)
    return value_BQHP.gather(-1, place).masked_fill(~inside, 0.0)


def is_complete(chosen_BQHN: Tensor, blocks: EntryWindows, rows: slice) -> Tensor:
    """Mask of the listed blocks that are there and complete."""
    return (chosen_BQHN >= 0) & (chosen_BQHN < blocks.count_BT[:, rows, None, None])


def is_local(chosen_BTUN: Tensor, blocks: EntryWindows, local: int, rows: slice) -> Tensor:
    """Mask of the listed blocks that are among the `local` newest of each query, its own included."""
    own_BQ11 = (blocks.position_BT[:, rows] // blocks.length)[:, :, None, None]
    return chosen_BTUN > own_BQ11 - local


def listed_log_sums(q_BQHK: Tensor, k_BSGK: Tensor, chosen_BQGN: Tensor, blocks: EntryWindows, rows: slice) -> Tensor:
    """Logarithm of the sum of exponentials of a query's scores over each complete block that is listed, [B, Q, H, N].

    Args:
        q_BQHK: queries of the piece.
        k_BSGK: keys of all tokens that they may see.
        chosen_BQGN: numbers of blocks in the query's document, a list per key/value head.
        blocks: the blocks.
        rows: places of the queries.
    """
    groups, dim = k_BSGK.shape[2:]
    offset_L = torch.arange(blocks.length, device=k_BSGK.device)
    inside_BQGN = is_complete(chosen_BQGN, blocks, rows)
    begin_BQ11 = blocks.begin_BT[:, rows, None, None]
    start_BQGN = (begin_BQ11 + chosen_BQGN * blocks.length).masked_fill(~inside_BQGN, 0)
    token_BQGNL = (start_BQGN[..., None] + offset_L).clamp_(max=k_BSGK.shape[1] - 1)
    row = torch.arange(len(k_BSGK), device=k_BSGK.device)[:, None, None, None, None]
    group = torch.arange(groups, device=k_BSGK.device)[:, None, None]
    k_BQGNLK = wide(k_BSGK)[row, token_BQGNL, group]
    q_BQGRK = wide(q_BQHK).unflatten(2, (groups, -1)) * dim**-0.5
    return torch.einsum("bqgrk,bqgnlk->bqgrnl", q_BQGRK, k_BQGNLK).logsumexp(-1).flatten(2, 3)


@torch.no_grad()
def local_log_sums(q_BTHK: Tensor, k_BSGK: Tensor, blocks: EntryWindows, local: int, seq: SequenceInfo) -> Tensor:
    """Logarithm of the sum of exponentials of each query's scores over its `local` newest blocks, [B, T, H]."""
    number_BTN = (blocks.position_BT // blocks.length)[..., None] - torch.arange(local, device=q_BTHK.device)
    lists_BT1N = number_BTN.clamp(min=-1)[:, :, None]
    return selected_attention(q_BTHK.detach(), k_BSGK.detach(), k_BSGK[..., :1].detach(), lists_BT1N,
                              block=blocks.length, cu_seqlens=seq.history_borders)[1]
