"""Warnings of routing that collapses: when, how often, and not by chance."""

import logging

import pytest
import torch

from hybridlm.model.feed_forward import MoEConfig
from hybridlm.training import train
from hybridlm.training.moe_health import MIN_EXPECTED, WINDOW_STEPS, RoutingWatch
from tests.support import tiny_run


def said_by(watch, loads, steps=WINDOW_STEPS):
    return [said for _ in range(steps) if (said := watch.add({"0": torch.tensor(loads)}))]


def test_a_collapse_is_said_once_until_it_grows_or_ends():
    watch = RoutingWatch("do this")
    balanced, some, more = [100] * 8, [200, 200, 200, 200, 0, 0, 0, 0], [800, 0, 0, 0, 0, 0, 0, 0]
    assert said_by(watch, balanced) == []
    first, = said_by(watch, some)
    assert first == ("routing collapses: 4 of 8 experts get no token, mean of the last 20 steps (layer 0: 4 of 8); "
                     "do this")
    assert said_by(watch, some, 3 * WINDOW_STEPS) == []
    grown, = said_by(watch, more)
    assert "7 of 8" in grown
    recovered, = said_by(watch, balanced)
    assert recovered == "routing has recovered: 0 of 8 experts get no token, mean of the last 20 steps"
    assert said_by(watch, balanced) == []


def test_experts_without_a_token_by_chance_are_not_dead():
    generator = torch.Generator().manual_seed(0)
    watch = RoutingWatch()
    for _ in range(10 * WINDOW_STEPS):  # 2 selections per expert: 14 % of the experts get none in a step
        ids = torch.randint(16, (32,), generator=generator)
        assert watch.add({"0": torch.bincount(ids, minlength=16)}) is None
    few = [MIN_EXPECTED, 0]  # half of the experts, for long enough: not by chance
    assert len(said_by(watch, few, 3 * WINDOW_STEPS)) == 1


def test_a_model_without_experts_says_nothing():
    assert RoutingWatch().add({}) is None


@pytest.mark.parametrize(("options", "warned"), [
    ({"correction_bias": True}, True), ({"balance_loss": 0.01}, False), ({"bias_update_rate": None}, False),
    ({"num_experts_per_tok": 4}, False)])
def test_experts_that_nothing_balances_are_said_at_the_start(options, warned, tmp_path, caplog):
    experts = MoEConfig(**{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, **options})
    with caplog.at_level(logging.WARNING, "hybridlm"):
        train(tiny_run.config(tmp_path, model_options={"feed_forward": experts}, steps=1))
    assert ("nothing balances the loads of the experts" in caplog.text) is warned


@pytest.mark.parametrize("trained", ["*", "*embed*"])
def test_routers_that_do_not_train_are_not_watched(trained, tmp_path, caplog, monkeypatch):
    watched = []
    monkeypatch.setattr(RoutingWatch, "add", lambda self, loads: watched.append(loads))
    experts = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    recipe = tiny_run.stages({"name": "only", "steps": 2, "trainable": [trained]})
    train(tiny_run.config(tmp_path, model_options={"feed_forward": experts}, recipe=recipe, eval_every=0))
    assert len(watched) == (2 if trained == "*" else 0)
