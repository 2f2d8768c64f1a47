"""Scan of falling maxima in torch operations: chunks of all rows side by side, then a carry from chunk to chunk.

Inside a chunk, m_t is the maximum from -inf and G_t the sum of g up to t. With the maximum s before the chunk the
maxima are max(m_t, G_t + s).

Legend: B rows, T tokens, C channels, P chunks per row, N documents.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.max_scan import reference
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.document_ends import find_document_ends

CHUNK_TOKENS = 32  # tokens per chunk; a fixed number, so that results do not depend on how long a row is
RECURRENT_MAX_TOKENS = 8  # up to so many tokens the recurrence itself is faster than chunks


def max_scan(x_BTC: Tensor, g_BTC: Tensor, state_NC: Tensor, borders: CuSeqlens | None) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked."""
    B, T, C = x_BTC.shape
    if borders is None and T <= RECURRENT_MAX_TOKENS:
        return reference.max_scan(x_BTC, g_BTC, state_NC, None)
    ends = find_document_ends(B, T, borders, x_BTC.device)
    x_XC, g_XC = x_BTC.reshape(-1, C), g_BTC.reshape(-1, C)
    first = torch.maximum(x_XC.index_select(0, ends.first_M),
                          g_XC.index_select(0, ends.first_M) + ends.at_documents(state_NC))
    x_XC = x_XC.index_copy(0, ends.first_M, first)
    g_XC = g_XC.index_fill(0, ends.first_M, -torch.inf)  # nothing of an earlier document
    m_BTC = _scan_rows(x_XC.view(B, T, C), g_XC.view(B, T, C))
    return m_BTC, ends.final_states(m_BTC.flatten(0, 1), state_NC)


def _scan_rows(x_BTC: Tensor, g_BTC: Tensor) -> Tensor:
    """The maxima [B, T, C] over each row."""
    T = x_BTC.shape[1]
    missing = -T % CHUNK_TOKENS
    m_BPTC = F.pad(x_BTC, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK_TOKENS)).clone()
    sums_BPTC = F.pad(g_BTC, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK_TOKENS)).clone()
    for before, t in pairwise(range(CHUNK_TOKENS)):
        torch.maximum(m_BPTC[:, :, t], m_BPTC[:, :, before] + sums_BPTC[:, :, t], out=m_BPTC[:, :, t])
    sums_BPTC = sums_BPTC.cumsum(2)
    for before, p in pairwise(range(m_BPTC.shape[1])):
        torch.maximum(m_BPTC[:, p], m_BPTC[:, before, -1:] + sums_BPTC[:, p], out=m_BPTC[:, p])
    return m_BPTC.flatten(1, 2)[:, :T]
