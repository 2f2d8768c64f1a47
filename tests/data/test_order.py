import pickle
import random
from collections import Counter
from itertools import pairwise

import pytest

from hybridlm.data.order import SampleOrder, block_counts, floor_sum


@pytest.mark.parametrize(("weights", "counts"), [
    ([1.0], [1]), ([0.7, 0.3], [7, 3]), ([2, 1, 1], [2, 1, 1]), ([1 / 3, 2 / 3], [1, 2]), ([0.999, 0.001], [999, 1])])
def test_blocks_meet_the_weights(weights, counts):
    assert block_counts(weights) == counts


UNEVEN = [[3.14159265, 2.71828182, 1e-6], [1.0, 1e-5], [0.97, 0.0299, 0.0001], [0.7123, 0.1999, 0.0878],
          [1.0] * 1500 + [1e-9]]


@pytest.mark.parametrize("weights", UNEVEN)
def test_weights_without_a_small_block_are_met_in_the_long_run(weights):
    counts = block_counts(weights)
    for count, weight in zip(counts, weights, strict=True):
        assert count / sum(counts) == pytest.approx(weight / sum(weights), rel=1e-3, abs=2**-40)


@pytest.mark.parametrize("weights", UNEVEN)
def test_any_stretch_of_samples_holds_what_the_weights_say(weights):
    """To within one or two samples of every source, from the first sample on and far into a run."""
    for first in (0, 123_456_789_000):
        order = SampleOrder([50] * len(weights), weights, seed=3)
        sources = Counter(order.place(first + i).source for i in range(20_000))
        for source, weight in enumerate(weights):
            assert abs(sources[source] - weight / sum(weights) * 20_000) < 2.5


def test_rare_sources_come_when_they_are_due():
    order = SampleOrder([50, 50], [1.0, 1e-4], seed=1)
    met = [i for i in range(60_000) if order.place(i).source == 1]
    assert len(met) in (5, 6)
    assert all(3_000 < b - a < 30_000 for a, b in pairwise(met))


@pytest.mark.parametrize("weights", UNEVEN[:4])
def test_uneven_weights_finish_each_epoch_before_the_next(weights):
    sizes = [37, 11, 3][:len(weights)]
    order = SampleOrder(sizes, weights, seed=5)
    for source, size in enumerate(sizes):
        found = [p for p in map(order.place, range(7_000)) if p.source == source]
        for epoch in range(len(found) // size):
            assert sorted(p.window for p in found if p.epoch == epoch) == list(range(size))


def test_floor_sums():
    draw = random.Random(0)
    for _ in range(300):
        count, modulus, step, start = (draw.randrange(1, 60) for _ in range(4))
        assert floor_sum(count, modulus, step, start) == sum((step * i + start) // modulus for i in range(count))
    assert floor_sum(0, 7, 3, 2) == 0


def test_runs_of_an_earlier_version_keep_their_order():
    """Blocks of rounded counts: the numbers are those that the earlier version gave."""
    order = SampleOrder([50, 8, 3], UNEVEN[0], seed=1, whole_blocks=True)
    assert (order.counts, order.block) == ([536, 463, 1], 1000)
    assert [tuple(order.place(i)) for i in (0, 1, 999, 1000, 54321)] == \
        [(0, 10, 24), (0, 2, 39), (0, 3, 5), (0, 20, 0), (0, 589, 46)]
    even = SampleOrder([50, 8], [3, 1], seed=1, whole_blocks=True)
    assert [even.place(i) for i in range(50)] == [SampleOrder([50, 8], [3, 1], seed=1).place(i) for i in range(50)]


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
