import pickle
from collections import Counter

import pytest

from hybridlm.data.order import SampleOrder, block_counts


@pytest.mark.parametrize(("weights", "counts"), [
    ([1.0], [1]), ([0.7, 0.3], [7, 3]), ([2, 1, 1], [2, 1, 1]), ([1 / 3, 2 / 3], [1, 2]), ([0.999, 0.001], [999, 1])])
def test_blocks_meet_the_weights(weights, counts):
    assert block_counts(weights) == counts


def test_weights_without_a_small_block_are_rounded():
    counts = block_counts([3.14159265, 2.71828182, 1e-6])
    assert counts[2] == 1
    assert abs(counts[0] / sum(counts) - 3.14159265 / 5.859875) < 0.001


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="positive"):
        block_counts(weights)


def test_every_block_holds_its_share():
    order = SampleOrder([50, 8, 1000], [0.5, 0.3, 0.2], seed=1)
    assert order.block == 10
    for block in range(30):
        sources = Counter(order.place(i).source for i in range(block * 10, block * 10 + 10))
        assert sources == {0: 5, 1: 3, 2: 2}


def test_each_source_finishes_its_epoch_before_the_next():
    order = SampleOrder([50, 8, 1000], [0.5, 0.3, 0.2], seed=1)
    met = {0: [], 1: [], 2: []}
    places = [order.place(i) for i in range(400)]
    for place in places:
        met[place.source].append(place)
    for source, size in ((0, 50), (1, 8)):
        for epoch in range(len(met[source]) // size):
            windows = [p.window for p in met[source] if p.epoch == epoch]
            assert sorted(windows) == list(range(size))
    assert order.epochs(400) == [4.0, 15.0, 0.08]


def test_blocks_and_epochs_have_orders_of_their_own():
    order = SampleOrder([20, 20], [1, 1], seed=0)
    slots = {tuple(order.place(i).source for i in range(b * 2, b * 2 + 2)) for b in range(20)}
    assert slots == {(0, 1), (1, 0)}
    single = SampleOrder([100], [1], seed=0)
    epochs = [[single.place(e * 100 + i).window for i in range(100)] for e in range(2)]
    assert epochs[0] != epochs[1] != list(range(100))


def test_seed_decides():
    orders = [[SampleOrder([64], [1], seed).place(i).window for i in range(64)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_unshuffled_is_the_order_of_the_stream():
    order = SampleOrder([5], [1], seed=9, shuffle=False)
    assert [order.place(i).window for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]


def test_copies_in_other_processes_agree():
    order = SampleOrder([50, 8], [0.6, 0.4], seed=1)
    order.place(3)
    copy = pickle.loads(pickle.dumps(order))
    assert [copy.place(i) for i in range(100)] == [order.place(i) for i in range(100)]


def test_bad_indices_and_sizes():
    with pytest.raises(IndexError):
        SampleOrder([3], [1], 0).place(-1)
    with pytest.raises(ValueError, match="at least one window"):
        SampleOrder([3, 0], [1, 1], 0)
