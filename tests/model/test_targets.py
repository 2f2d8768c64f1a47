"""Targets and the tokens MTP is told: nothing crosses a document."""

import itertools

import pytest
import torch

from hybridlm.model.targets import IGNORE, build_targets, tokens_ahead
from hybridlm_kernels import CuSeqlens

ROWS = torch.arange(24).view(2, 12)
BORDERS = [0, 1, 5, 12, 20, 24]  # a document of one token among them


def by_hand(labels, depth, borders):
    flat = labels.flatten().tolist()
    document = [d for d, (a, b) in enumerate(itertools.pairwise(borders)) for _ in range(b - a)]
    out = torch.full((len(flat), 1 + depth), IGNORE)
    for t in range(len(flat)):
        for d in range(1 + depth):
            if t + 1 + d < len(flat) and document[t + 1 + d] == document[t]:
                out[t, d] = flat[t + 1 + d]
    return out.view(*labels.shape, 1 + depth)


@pytest.mark.parametrize("depth", [0, 1, 3, 15])
def test_targets_stay_in_the_document(depth):
    packed = build_targets(ROWS, depth, BORDERS)
    assert torch.equal(packed, by_hand(ROWS, depth, BORDERS))
    rows = build_targets(ROWS, depth)
    assert torch.equal(rows, by_hand(ROWS, depth, [0, 12, 24]))


def test_labels_that_do_not_count_stay_out():
    labels = ROWS.clone()
    labels[0, 3] = IGNORE
    targets = build_targets(labels, 1)
    assert targets[0, 2, 0] == IGNORE
    assert targets[0, 1, 1] == IGNORE
    assert targets[0, 3, 0] == 4


def test_borders_in_any_form_say_the_same():
    expected = build_targets(ROWS, 2, BORDERS)
    for form in (torch.tensor(BORDERS), CuSeqlens(BORDERS), tuple(BORDERS)):
        assert torch.equal(build_targets(ROWS, 2, form), expected)


def test_borders_that_cross_a_row_are_refused():
    with pytest.raises(ValueError, match="cross a row"):
        build_targets(ROWS, 0, [0, 5, 24])


def test_tokens_ahead_come_from_the_batch_then_from_the_targets():
    targets = build_targets(ROWS, 1, BORDERS)
    targets[0, 11, 0] = 77  # the document of the first row's end goes on after the window
    told = tokens_ahead(ROWS, targets, 1, CuSeqlens(BORDERS))
    assert told[0].tolist() == [0, 2, 3, 4, 4, 6, 7, 8, 9, 10, 11, 77]
    assert told[1].tolist() == [13, 14, 15, 16, 17, 18, 19, 19, 21, 22, 23, 23]


def test_a_label_that_does_not_count_hides_no_token():
    targets = torch.full((2, 12, 2), IGNORE)
    told = tokens_ahead(ROWS, targets, 2)
    assert told[0].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11]
