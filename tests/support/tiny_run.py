"""A run that takes a second: a tiny model with a linear layer, experts and MTP, on a Python source file."""

import argparse
import json
import os
import signal
from pathlib import Path

import torch

from hybridlm import checkpoint
from hybridlm.config.schema import Config, DataConfig, RecipeConfig, StageConfig, TrainingConfig
from hybridlm.config.serialization import from_dict
from hybridlm.model.config import ModelConfig, MTPConfig, ScheduleConfig
from hybridlm.model.feed_forward import MoEConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig
from hybridlm.optimizers import OptimizerConfig
from hybridlm.training import train
from hybridlm.training import trainer as trainer_module

TEXT = argparse.__file__


def model(**options):
    defaults = {
        "vocab_size": 257, "hidden_size": 32, "num_layers": 2, "max_position": 64, "name": "tiny",
        "schedule": ScheduleConfig(pattern=["linear", "full"]),
        "mixers": {"linear": DeltaRuleConfig(num_heads=2, head_dim=16),
                   "full": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16)},
        "feed_forward": MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                                  num_shared_experts=1, router="sigmoid", bias_update_rate=0.01, balance_loss=0.01,
                                  dense_layers=[0], intermediate_size=32),
        "mtp": MTPConfig(depth=1)}
    return ModelConfig(**{**defaults, **options})


def config(folder, *, optimizer=None, recipe=None, data=None, model_options=None, **training):
    """`training` options over defaults of 8 steps; data is prepared once a session in `folder`/../cache."""
    folder = Path(folder)
    text = folder / "text.py"
    folder.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        text.write_text(Path(TEXT).read_text(encoding="utf-8"), encoding="utf-8")
    options = {"steps": 8, "sequence_length": 32, "batch_size": 4, "eval_every": 4, "eval_batches": 2,
               "checkpoint_every": 3, "log_every": 4, **training}
    return Config(
        model=model(**(model_options or {})),
        data=DataConfig(**{"path": str(text), "validation_fraction": 0.1, "cache_dir": str(folder / "cache"),
                           **(data or {})}),
        optimizer=from_dict(OptimizerConfig, {"lr": 1e-2, **(optimizer or {})}),
        recipe=RecipeConfig(**recipe) if recipe else RecipeConfig(),
        training=TrainingConfig(**options), run_dir=str(folder / "run"))


def stages(*options):
    return {"name": "test", "stages": [StageConfig(**o) for o in options]}


def records(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return {r["step"]: (r["loss"], r["total_loss"], r["grad_norm"], r.get("validation_loss")) for r in records(run_dir)}


def weights(folder, stem="model"):
    return dict(checkpoint.read_tensors(checkpoint.resolve(folder), stem))


def check_resume(monkeypatch, make_config, step, done):
    """A run that is stopped after `step` and started again ends, to the bit, as the run in the folder `done`."""
    original = trainer_module.Trainer._step

    def stop_at(self, *args):
        original(self, *args)
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer_module.Trainer, "_step", stop_at)
    config = make_config()
    assert train(config).status == "interrupted"
    monkeypatch.undo()
    assert train(config).status == "finished"
    assert losses(config.run_dir) == losses(done)
    ours, theirs = weights(config.run_dir), weights(done)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
