"""Tables of chunks and segments: every token in one chunk of its document, segments that follow one another."""

from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.recurrence.triton_chunk_tables import get_chunk_tables

BORDERS = [0, 1, 65, 129, 500, 501, 800]


@pytest.mark.parametrize("borders", [None, BORDERS])
@pytest.mark.parametrize("most", [1, 2, 100])
def test_every_token_once(borders, most):
    cuts = borders or [0, 400, 800]
    tables = get_chunk_tables(2, 400, None if borders is None else CuSeqlens(borders), torch.device("cpu"))
    tokens = [first + t for first, filled in tables.chunks.tolist() for t in range(filled)]
    assert tokens == list(range(800))
    assert all(0 < filled <= 64 for _, filled in tables.chunks.tolist())
    segments, of_documents = tables.segments(most)
    by_number = sorted(segments.tolist())
    assert [p[0] for p in by_number] == list(range(len(by_number)))
    assert all(a[2] - a[1] >= b[2] - b[1] for a, b in pairwise(segments.tolist()))
    for (start, end), (first, behind) in zip(pairwise(cuts), of_documents.tolist(), strict=True):
        own = by_number[first:behind]
        assert [p[1] for p in own] == list(range(start, end, 64 * most))
        assert [p[2] for p in own] == [*(p[1] for p in own[1:]), end]
        assert all(tables.chunks[p[3], 0] == p[1] for p in own)


def test_documents_come_longest_first():
    documents = get_chunk_tables(1, 800, CuSeqlens(BORDERS), torch.device("cpu")).documents.tolist()
    assert [d[0] for d in documents] == [3, 5, 1, 2, 0, 4]
    assert documents[0] == [3, 129, 500, 3]
