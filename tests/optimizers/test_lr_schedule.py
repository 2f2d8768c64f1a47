import itertools

import pytest

from hybridlm.errors import ConfigError
from hybridlm.optimizers import LRScheduleConfig
from hybridlm.optimizers.lr_schedule import check_schedule, lr_factor


def curve(total=100, **kwargs):
    config = LRScheduleConfig(**kwargs)
    return [lr_factor(config, step, total) for step in range(total)]


def test_warmup_is_linear_and_reaches_the_peak():
    factors = curve(warmup=10, kind="constant")
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:] == [1.0] * 90


def test_warmup_may_be_a_share():
    assert curve(warmup=0.1, kind="cosine") == curve(warmup=10, kind="cosine")


def test_cosine_falls_from_peak_to_min_ratio():
    factors = curve(warmup=0, kind="cosine", min_ratio=0.1)
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(factors))
    config = LRScheduleConfig(warmup=0, kind="cosine", min_ratio=0.1)
    assert lr_factor(config, 100, 100) == pytest.approx(0.1)


def test_wsd_is_flat_then_linear():
    factors = curve(warmup=5, kind="wsd", decay=0.2, min_ratio=0.0)
    assert factors[4:81] == [1.0] * 77
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 20)


def test_no_decay_and_no_warmup_divide_by_nothing():
    assert curve(warmup=0, kind="wsd", decay=0) == [1.0] * 100


def test_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="130 steps of a stage of 100"):
        check_schedule(LRScheduleConfig(warmup=80, kind="wsd", decay=0.5), 100)
