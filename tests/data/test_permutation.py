import numpy as np
import pytest

from hybridlm.data.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_element_comes_once(size):
    order = Permutation(size, 7, "epoch", 0)
    assert sorted(order(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 5, 17, 4097, 2**33 + 5])
def test_one_index_and_many_agree(size):
    order = Permutation(size, 3)
    index = np.unique(np.linspace(0, size - 1, 500).astype(np.int64))
    assert order.of(index).tolist() == [order(int(i)) for i in index]


def test_size_beyond_any_table():
    order = Permutation(10**15, 0)
    found = order.of(np.arange(20000))
    assert len(set(found.tolist())) == 20000
    assert found.min() >= 0
    assert found.max() < 10**15
    assert abs(found.mean() / 10**15 - 0.5) < 0.02


def test_key_decides_the_order():
    a, b, c = (Permutation(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0)))
    orders = [tuple(p.of(np.arange(1000)).tolist()) for p in (a, b, c)]
    assert len(set(orders)) == 3
    assert orders[0] == tuple(Permutation(1000, 0, 0).of(np.arange(1000)).tolist())


def test_order_is_the_same_on_every_machine():
    assert [Permutation(10, 0)(i) for i in range(10)] == [1, 7, 3, 9, 6, 5, 2, 0, 4, 8]


def test_neighbours_are_spread():
    order = Permutation(1 << 16, 5).of(np.arange(1 << 16))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(1 << 16), order)[0, 1]) < 0.02


def test_small_orders_are_even():
    seen = np.zeros((5, 5))
    for seed in range(2000):
        for i, value in enumerate(Permutation(5, seed).of(np.arange(5))):
            seen[i, value] += 1
    assert np.abs(seen / 2000 - 0.2).max() < 0.04


def test_nothing_to_permute():
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, 1)
