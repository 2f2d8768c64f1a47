"""Documents without tokens on the Triton backends."""

import pytest

from hybridlm_kernels.registry import operations
from tests.support.empty_documents import (
    RECURRENT,
    assert_empty_documents_are_invisible,
    assert_empty_documents_keep_their_states,
)

TRITON = {op.name for op in operations() if "triton" in [backend.name for backend in op.backends]}


@pytest.mark.parametrize("name", ["indexer_topk", "indexer_kl"])
def test_no_operation_notices_them(name, device):
    assert_empty_documents_are_invisible(name, "triton", device)


@pytest.mark.parametrize("name", sorted(RECURRENT.keys() & TRITON))
def test_they_keep_their_states(name, device):
    assert_empty_documents_keep_their_states(name, "triton", device)
