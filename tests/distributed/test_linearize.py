"""Conversion of a teacher on two ranks: the losses of one process, whatever divides its batch, weights or experts."""

import pytest

from hybridlm.cli import main
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.mixers import AttentionConfig
from hybridlm.training import train
from tests.support import tiny_run
from tests.support.rank_pool import TRAIN
from tests.support.run_records import assert_same_run

pytest.importorskip("deepspeed")
ATTENTION = {"num_layers": 3, "schedule": ScheduleConfig(pattern=["full"]),
             "mixers": {"full": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16)}}
ENGINES = {"ddp": ["engine=ddp"], "zero3": ["engine=zero3", "engine.persistence_threshold=64"],
           "experts": ["engine=ddp", "engine.expert_parallel=2"]}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The words of a conversion with all three stages; the teacher has experts and multi-token prediction."""
    root = tmp_path_factory.mktemp("linearize")
    teacher = train(tiny_run.config(root, model_options=ATTENTION, steps=2, eval_every=0)).run_dir
    stages = {"sequence_length": 32, "batch_size": 4, "lr": "2e-3", "schedule": "{kind: constant}"}

    def make(name, *more):
        return ["recipe=linearize_tiny", f"teacher={teacher}", f"run_dir={root / name}", f"data.path={root}/text.py",
                f"data.cache_dir={root}/cache", "data.validation_fraction=0.1", "recipe.convert.keep=[1]",
                *(f"recipe.stages.{i}.{key}={value}" for i in range(3) for key, value in stages.items()),
                "recipe.stages.0.steps=2", "recipe.stages.1.steps=2", "recipe.stages.2.steps=1",
                "training.eval_batches=1", "training.eval_every=0", "training.log_every=1000", *more]

    make.root = root
    assert main(["train", *make("one")]) == 0
    return make


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_convert_as_one(words, two_ranks, engine):
    two_ranks.run(TRAIN, *words(engine, *ENGINES[engine]))
    # A divergence of 1e-3 nats is a difference of logarithms near 5, which are known to 1e-7.
    assert_same_run(words.root / engine, words.root / "one", absolute=1e-7)
