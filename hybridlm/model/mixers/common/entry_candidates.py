"""Candidates: blocks of entries that one layer marks by its scores, and among which indexers of later layers select.

    block b holds the entries b L .. b L + L - 1 of the document,   score of b = max of the scores of its entries

The best blocks are marked, and always that of the newest entry, which is one of them even while it is not complete.

Source: DeepSeek-V4.1-Flash, 2026, as its inference code is described: blocks of 8 entries, the best 2048.
B rows, T tokens, Q queries of a piece, E entries, P blocks, C marked blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.mixers.common.block_selection import BlockIndex, ScoresBlocks, query_pieces
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.entry_indexer_config import CandidateConfig
from hybridlm_kernels.ops.sparse_attention.torch_backend import select_best


@torch.no_grad()
def mark_candidates(indexer: ScoresBlocks, index: BlockIndex, config: CandidateConfig) -> Tensor:
    """Mark the best blocks of entries of each query; equal scores go to the earlier block.

    Args:
        indexer: scores entries, with one list for all heads.
        index: its queries and keys.
        config: size and number of blocks.

    Returns:
        Numbers of blocks in the query's document, int64 [B, T, C], ascending, -1 for none.
    """
    windows, found = index.windows, []
    with torch.autocast(index.queries_BT.device.type, enabled=False):
        for rows in query_pieces(index, indexer.scores_per_entry):
            score_BQE = indexer.scores(index, rows)[:, :, 0].masked_fill(~windows.visible(rows), -torch.inf)
            block_BQE, blocks = _block_of_entries(windows, config.block, rows)
            score_BQP = score_BQE.new_full((*score_BQE.shape[:2], blocks), -torch.inf)
            score_BQP.scatter_reduce_(2, block_BQE, score_BQE, "amax")
            newest_BQ1 = (windows.count_BT[:, rows, None] - 1).div(config.block, rounding_mode="floor")
            newest_BQP = torch.arange(blocks, device=score_BQP.device) == newest_BQ1
            score_BQP = score_BQP.masked_fill(newest_BQP, torch.inf)
            found.append(select_best(score_BQP, score_BQP > -torch.inf, config.topk, False))
    return torch.cat(found, 1)


class AmongCandidates:
    """Scores of an indexer for `choose_blocks`, -inf for entries that are no candidates."""

    def __init__(self, indexer: ScoresBlocks, candidates_BTC: Tensor, block: int):
        """Keep to candidates.

        Args:
            indexer: scores entries, with one list for all heads.
            candidates_BTC: from `mark_candidates`.
            block: entries of a block.
        """
        self.indexer = indexer
        self.candidates_BTC = candidates_BTC
        self.block = block
        self.lists, self.scores_per_entry = indexer.lists, indexer.scores_per_entry

    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        """Scores [B, Q, 1, E] of all entries for the queries `rows`."""
        block_BQE, blocks = _block_of_entries(index.windows, self.block, rows)
        marked_BQC = self.candidates_BTC[:, rows]
        marked_BQP = torch.zeros(*marked_BQC.shape[:2], blocks + 1, dtype=torch.bool, device=marked_BQC.device)
        marked_BQP.scatter_(2, marked_BQC.masked_fill(marked_BQC < 0, blocks), True)
        candidate_BQE = marked_BQP[..., :-1].gather(2, block_BQE)
        return self.indexer.scores(index, rows).masked_fill(~candidate_BQE[:, :, None], -torch.inf)


def _block_of_entries(windows: EntryWindows, block: int, rows: slice) -> tuple[Tensor, int]:
    """The block [B, Q, E] of each entry, counted from the first entry of the query's document, and their number.

    Entries before that document get its first block; no query sees them.
    """
    entry_E = torch.arange(windows.number, device=windows.first_BT.device)
    number_BQE = (entry_E - windows.first_BT[:, rows, None]).clamp_(min=0)
    return number_BQE // block, -(-windows.number // block)
