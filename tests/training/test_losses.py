"""Losses and statistics of layers in the records of a step, those of a user's own kind too."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hybridlm.config.schema import StageConfig
from hybridlm.errors import ConfigError
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.mixers import MIXERS, AttentionConfig, register_mixer
from hybridlm.model.mixers.attention import Attention
from hybridlm.model.model import build_model
from hybridlm.training import train
from tests.support import tiny_run


@dataclass(kw_only=True)
class GreedyConfig(AttentionConfig):
    kind: str = "greedy"
    loss_names: ClassVar[tuple[str, ...]] = ("size",)


@pytest.fixture
def greedy():
    """Attention with a loss on the size of its output, of weight 0.5, and a statistic."""

    @register_mixer("greedy", GreedyConfig)
    class Greedy(Attention):
        loss_weights: ClassVar = {"size": 0.5}

        def forward(self, x_BTD, seq, state=None):
            y_BTD, aux = super().forward(x_BTD, seq, state)
            return y_BTD, {**aux, "loss/size": y_BTD.square().mean(), "stat/peak": y_BTD.abs().max()}

    yield {"mixers": {"own": GreedyConfig(num_heads=2, head_dim=16)}, "schedule": ScheduleConfig(pattern=["own"])}
    del MIXERS["greedy"]


def test_a_stage_weighs_the_losses_of_a_users_own_kind(greedy, tmp_path):
    stages = tiny_run.stages({"name": "a", "steps": 1, "loss_weights": {"size": 2.0, "mtp": 0.0, "balance": 0.0}})
    train(tiny_run.config(tmp_path, steps=1, recipe=stages, model_options=greedy))
    record, = tiny_run.records(tmp_path / "run")
    assert record["loss/size"] > 0
    assert record["total_loss"] == pytest.approx(record["loss/lm"] + 2.0 * record["loss/size"], rel=1e-5)
    assert record["stat/peak_min"] <= record["stat/peak"] <= record["stat/peak_max"]
    assert record["validation_stat/peak"] > 0


def test_without_a_weight_of_the_stage_the_kinds_own_counts(greedy, tmp_path):
    model = build_model(tiny_run.config(tmp_path, model_options=greedy).model)
    ids = torch.arange(16)[None]
    output = model(ids, labels=ids)
    without = output.losses["lm"] + model.config.mtp.loss_weight * output.losses["mtp"]
    balance = model.config.feed_forward.balance_loss * output.losses["balance"]
    torch.testing.assert_close(output.loss, without + balance + 0.5 * output.losses["size"])


def test_a_loss_that_no_registered_kind_has_is_refused():
    with pytest.raises(ConfigError, match=r"loss_weights\.size: is not a loss; expected one of lm, mtp, z, indexer_kl"):
        StageConfig(name="a", loss_weights={"size": 1.0})
