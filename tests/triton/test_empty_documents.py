"""Documents without tokens on the Triton backends."""

import pytest

from tests.support.empty_documents import (
    RECURRENT,
    assert_empty_documents_are_invisible,
    assert_empty_documents_keep_their_states,
)


@pytest.mark.parametrize("name", ["indexer_topk", "indexer_kl"])
def test_no_operation_notices_them(name, device):
    assert_empty_documents_are_invisible(name, "triton", device)


@pytest.mark.parametrize("name", RECURRENT)
def test_they_keep_their_states(name, device):
    assert_empty_documents_keep_their_states(name, "triton", device)
