"""Borders of packed documents: every spelling that is read, what is refused, and documents without tokens."""

import inspect

import numpy as np
import pytest
import torch

import hybridlm_kernels as ops
from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.registry import operations
from tests.support.empty_documents import (
    BORDERS,
    RECURRENT,
    STATELESS,
    assert_empty_documents_are_invisible,
    assert_empty_documents_keep_their_states,
)


@pytest.mark.parametrize("table", [
    [0, 2, 5], (0, 2, 5), [[0, 2, 5]], torch.tensor([0, 2, 5]), torch.tensor([[0, 2, 5]], dtype=torch.int32),
    np.array([0, 2, 5]), [torch.tensor(0), torch.tensor(2), torch.tensor(5)], CuSeqlens([0, 2, 5])])
def test_every_spelling_of_a_table_is_read(table):
    assert CuSeqlens.of(table, "cpu").host == (0, 2, 5)


@pytest.mark.parametrize(("table", "message"), [
    ([[0, 2], [0, 3]], r"one table \[documents \+ 1\].*got shape \[2, 2\]"),
    (torch.tensor([0.0, 2.0]), "must be integers; got float32"),
    (torch.tensor([True, False]), "must be integers; got bool"),
    ([1, 5], r"must start at 0.*got \[1, 5\]"),
    ([0, 3, 2], r"never decrease.*got \[0, 3, 2\]"),
    ([0, 0], "at least one token"),
    ([0], "must start at 0"),
])
def test_what_is_no_table_is_refused_by_name(table, message):
    with pytest.raises(ValueError, match=message):
        CuSeqlens.of(table, "cpu")


def test_positions_and_documents_of_a_table_with_empty_documents():
    borders = CuSeqlens([0, 0, 2, 2, 5, 5])
    assert borders.num_documents == 5
    assert borders.lengths == [0, 2, 0, 3, 0]
    assert borders.document_ids().tolist() == [1, 1, 3, 3, 3]
    assert borders.positions().tolist() == [0, 1, 0, 1, 2]
    assert borders.filled.host == (0, 2, 5)
    assert borders.filled_documents().tolist() == [1, 3]
    assert CuSeqlens(BORDERS).filled.host == tuple(BORDERS)


def test_every_operation_that_takes_borders_is_tested_with_empty_documents():
    packed = {op.name for op in operations() if "cu_seqlens" in inspect.signature(getattr(ops, op.name)).parameters}
    assert packed <= {*STATELESS, *RECURRENT}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", list(STATELESS))
def test_no_operation_notices_empty_documents(name, backend):
    assert_empty_documents_are_invisible(name, backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", RECURRENT)
def test_empty_documents_keep_their_states(name, backend):
    assert_empty_documents_keep_their_states(name, backend)


def test_a_table_of_nothing_but_padding_around_one_document():
    x = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = ops.attention(x, x, x)
    assert torch.equal(ops.attention(x, x, x, cu_seqlens=[0, 0, 6, 6, 6]), expected)
