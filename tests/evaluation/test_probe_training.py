"""Training on a probe: a model learns it, two calls agree, what is not finite does no harm."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.evaluation.probe_training import model_for_probe, score_on_probe, train_on_probe
from hybridlm.evaluation.probes import make_probe
from hybridlm.model.model import build_model
from hybridlm.run_config import load_config


@pytest.fixture(scope="module")
def config():
    return load_config("train", ["model=hybrid_tiny", "model.num_layers=2", "model.hidden_size=32",
                                 "model.feed_forward={kind: dense, intermediate_size: 64}",
                                 "model.schedule.linear=gdn", "model.schedule.ratio=1", "model.mtp.depth=1"]).model


SMALL = {"num_pairs": 2, "key_vocab": 4, "value_vocab": 4}


def test_a_small_model_learns_recall_and_is_scored_at_every_length(config):
    seen = []
    result = train_on_probe(config, make_probe("mqar", SMALL), 80, 3e-3, length=12, examples=64,
                            on_step=lambda step, loss: seen.append((step, loss)))
    assert list(result.accuracy) == [12, 24, 48]
    assert result.accuracy[12].token > 0.9 > 2 * result.chance
    assert result.accuracy[12].tokens == 128
    assert [step for step, _ in seen] == list(range(1, 81))
    assert result.loss < 0.5 * seen[0][1]
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["parameters"]["num_pairs"] == 2
    assert plain["accuracy"]["24"]["examples"] == 64


def test_the_same_call_gives_the_same_result(config):
    first, again, other = (train_on_probe(config, make_probe("mqar", SMALL), 4, 3e-3, seed, length=12, examples=8)
                           for seed in (1, 1, 2))
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.loss != other.loss


def test_a_model_for_a_probe_keeps_its_layers(config):
    probe = make_probe("s5")
    made = model_for_probe(config, probe, 10_000)
    assert (made.vocab_size, made.mtp.depth, made.max_position) == (120, 0, 10_000)
    assert (made.layers(), made.hidden_size) == (config.layers(), config.hidden_size)
    assert config.mtp.depth == 1


def test_an_untrained_model_scores_near_chance_and_keeps_its_mode(config):
    probe = make_probe("needle_single")
    model = build_model(model_for_probe(config, probe, 64)).train()
    score = score_on_probe(model, probe, 32, examples=40, batch_size=16)
    assert score.examples == score.tokens == 40
    assert score.token < 0.3
    assert model.training


def test_a_gradient_that_is_not_finite_changes_nothing(config, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    norms = iter([math.nan, None, math.inf])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *a: clip(*a) if (n := next(norms)) is None else torch.tensor(n))
    result = train_on_probe(config, "parity", 3, length=4, eval_lengths=[4], examples=4)
    assert result.skipped_steps == 2
    assert result.probe == "parity"
    assert math.isfinite(result.loss)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"steps": 0}, ["steps", "must be positive"]),
    ({"length": 10}, ["length", "too short for mqar", "at least 24"]),
    ({"eval_lengths": [32, 8]}, ["length", "8", "at least 24"]),
    ({"lr": -1.0}, ["lr"]),
    ({"seed": -1}, ["seed"]),
])
def test_what_cannot_be_trained_is_refused_at_once(config, arguments, words):
    with pytest.raises(ConfigError) as error:
        train_on_probe(config, "mqar", **arguments)
    assert all(word in str(error.value) for word in words)
