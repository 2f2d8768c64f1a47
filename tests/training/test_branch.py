"""Changing a run on its way: branches, their lineage, and what a changed length does to the learning rate."""

import json
import logging
import shlex

import pytest
import torch

from hybridlm import checkpoint
from hybridlm.cli import main
from hybridlm.config.serialization import to_dict
from hybridlm.errors import CheckpointError, ConfigError, UserError
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm.training import trainer as trainer_module
from hybridlm.training.guards import TrainingStopped
from tests.support import tiny_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of 8 steps with checkpoints at 3, 6 and 8; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("base")
    return train(tiny_run.config(folder, keep_checkpoints=10)).run_dir


def branch(source, run_dir, *more):
    return load_config("train", [f"branch_from={source}", f"run_dir={run_dir}", *more])


def weights(folder, stem="model"):
    return dict(checkpoint.read_tensors(checkpoint.resolve(folder), stem))


def typed(message):
    """The command in a message, as the words after `hybridlm train`."""
    words = shlex.split(message[message.index("hybridlm train"):].split("; or take")[0])
    return words[2:]


@pytest.mark.parametrize("step", [3, 6])
def test_a_branch_with_nothing_changed_is_the_resumed_run_bit_for_bit(base, tmp_path, step, caplog):
    with caplog.at_level(logging.INFO, "hybridlm"):
        train(branch(base / f"checkpoints/step-{step}", tmp_path / "run"))
    assert f"branch of {base}/checkpoints/step-{step}, which has made {step} steps; nothing has changed" in caplog.text
    assert "learning rate:" not in caplog.text
    whole = tiny_run.losses(base)
    assert tiny_run.losses(tmp_path / "run") == {n: whole[n] for n in range(step + 1, 9)}
    for stem in ("model", "optimizer"):
        ours, theirs = weights(tmp_path / "run", stem), weights(base, stem)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "run/lineage.json").read_text())["changes"] == []


def test_what_changes_is_printed_recorded_and_kept_over_branches_of_branches(base, tmp_path, caplog):
    start = base / "checkpoints/step-6"
    with caplog.at_level(logging.INFO, "hybridlm"):
        train(branch(start, tmp_path / "a", "optimizer.lr=1e-3", "training.batch_size=2", "training.steps=9",
                     "training.sequence_length=16", "data.validation_fraction=0.2"))
    for line in ("optimizer.lr 0.01 -> 0.001", "training.batch_size 4 -> 2", "training.sequence_length 32 -> 16",
                 "training.steps 8 -> 9", "data.validation_fraction 0.1 -> 0.2", "goes on with sample 24 of the new"):
        assert line in caplog.text
    rows = tiny_run.records(tmp_path / "a")
    assert [(row["step"], row["samples"], row["tokens"]) for row in rows] == [
        (7, 26, 6 * 128 + 32), (8, 28, 6 * 128 + 64), (9, 30, 6 * 128 + 96)]
    assert max(row["lr"] for row in rows) < 1e-3
    train(branch(tmp_path / "a", tmp_path / "b", "training.steps=10", "optimizer.betas=[0.8,0.9]"))
    for folder in (tmp_path / "b", checkpoint.resolve(tmp_path / "b")):
        lineage = checkpoint.read_lineage(folder)
        assert [(entry["step"], entry["checkpoint"]) for entry in checkpoint.lineage_steps(lineage)] == [
            (9, str(tmp_path / "a/checkpoints/step-9")), (6, str(start))]
    assert checkpoint.describe_lineage(lineage)[1].startswith(f"branch of {start} (step 6): data.validation_fraction")


def test_a_stopped_branch_goes_on_in_its_own_folder_whatever_becomes_of_the_other(base, tmp_path, monkeypatch):
    settings = ["optimizer.lr=2e-3", "training.checkpoint_every=1"]
    train(branch(base / "checkpoints/step-3", tmp_path / "whole", *settings))
    original = trainer_module.Trainer._step

    def fail_at(step):
        def fail(trainer, *args):
            if trainer.progress.step == step:
                raise RuntimeError("killed")
            original(trainer, *args)
        return fail

    for step in (3, 5):  # before its first checkpoint, and after
        monkeypatch.setattr(trainer_module.Trainer, "_step", fail_at(step))
        with pytest.raises(RuntimeError, match="killed"):
            train(branch(base / "checkpoints/step-3", tmp_path / "run", *settings))
    monkeypatch.undo()
    config = load_config("train", ["branch_from=/gone", f"run_dir={tmp_path}/run", *settings])
    config.branch_from = str(base / "checkpoints/step-3")  # as the saved config has it
    train(config)
    assert tiny_run.losses(tmp_path / "run") == tiny_run.losses(tmp_path / "whole")


def test_a_stage_appended_to_a_finished_run_anneals(base, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hybridlm"):
        train(branch(base, tmp_path / "run", "recipe=anneal", "training.steps=4", "optimizer.lr=1e-3"))
    rows = tiny_run.records(tmp_path / "run")
    assert [(row["step"], row["stage"]) for row in rows] == [(step, "anneal") for step in (9, 10, 11, 12)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert "learning rate: 0.001 in step 9 (" in caplog.text
    assert "0.00025 in the last step, 12" in caplog.text
    assert "recipe.stages ['pretrain'] -> ['anneal']" in caplog.text
    assert "recipe.stages.anneal None -> {'schedule': {'kind': 'linear', 'warmup': 0.0" in caplog.text
    assert "recipe.stages.0" not in caplog.text
    # The old stage may also stay in the list; then the new one follows it.
    both = ("recipe.stages=[{name: pretrain}, {name: long, steps: 2, sequence_length: 64, batch_size: 2, lr: 1e-4}]")
    train(branch(base, tmp_path / "both", both))
    assert [(row["step"], row["stage"], row["tokens"]) for row in tiny_run.records(tmp_path / "both")] == [
        (9, "long", 8 * 128 + 128), (10, "long", 8 * 128 + 256)]


def test_another_mixture_is_named_source_by_source(base, tmp_path, caplog):
    other = tmp_path / "other.txt"
    other.write_text("some more text\n" * 400)
    sources = f"[{{path: {tiny_run.TEXT}, weight: 3}}, {{path: {other}}}]"
    with caplog.at_level(logging.INFO, "hybridlm"):
        train(branch(base / "checkpoints/step-6", tmp_path / "run", f"data.mixture={sources}", "training.steps=7"))
    assert (f"data.mixture [] -> [{{'path': '{tiny_run.TEXT}', 'weight': 3.0}}, {{'path': '{other}'}}]") in caplog.text
    assert "data.mixture.0" not in caplog.text
    assert f"data: {tiny_run.TEXT} and {other}, " in caplog.text


def test_another_optimizer_and_other_trained_parameters(base, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hybridlm"):
        train(branch(base / "checkpoints/step-6", tmp_path / "run", "optimizer=lion", "optimizer.lr=1e-4",
                     "recipe.stages.0.trainable=['layers.1.*']"))
    assert "optimizer.kind 'adamw' -> 'lion'" in caplog.text
    before, after = weights(base / "checkpoints/step-6"), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("layers.1.") for name in changed)


@pytest.mark.parametrize(("settings", "error", "words"), [
    ([], ConfigError, r"has made all steps of this plan \(8\).*training.steps=N goes on"),
    (["training.steps=9", "model.hidden_size=64"], CheckpointError,
     "model.hidden_size 32 -> 64. A branch keeps the model.*init_from="),
    (["training.steps=9", "model.schedule.pattern=[full]"], CheckpointError, "layer 0: mixer linear -> full"),
    (["training.steps=9", "recipe=dsa_tiny"], ConfigError, "recipe.indexer: converts a model.*init_from="),
    (["training.steps=9", "data.tokenizer=bpe", "data.tokenizer_vocab_size=257"], ConfigError,
     "data.tokenizer: is not that of the checkpoint: it differs in"),
    (["training.steps=9", "init_from=/somewhere"], ConfigError, "branch_from: cannot stand beside init_from"),
])
def test_what_a_branch_refuses(base, tmp_path, settings, error, words):
    with pytest.raises(error, match=words) as caught:
        train(branch(base, tmp_path / "run", *settings))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def test_a_branch_needs_a_folder_and_a_checkpoint_of_training(base, tmp_path):
    assert load_config("train", [f"branch_from={base}", "training.steps=9"]).run_dir == f"{base}-branch"
    with pytest.raises(ConfigError, match="branch_from: no such checkpoint; got '/nowhere'"):
        branch("/nowhere", tmp_path / "run")
    inside = base / "checkpoints/step-3"
    with pytest.raises(ConfigError, match=f"branch_from={inside} run_dir={base}-branch"):
        train(branch(inside, base))
    config = branch(base, tmp_path / "run", "training.steps=9")
    model = checkpoint.load_checkpoint(base)
    checkpoint.write(tmp_path / "bare", 0, checkpoint.model_texts({"model": to_dict(model.config)}, model.config, None),
                     {"model": checkpoint.unique_tensors(model)})
    config.branch_from = str(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=f"holds weights alone.*init_from={tmp_path}/bare starts a run"):
        train(config)


def test_model_options_that_leave_every_weight_its_place_may_change(base, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hybridlm"):
        train(branch(base, tmp_path / "run", "training.steps=9", "model.max_position=128",
                     "training.sequence_length=128", "training.batch_size=2"))
    assert "model.max_position 64 -> 128" in caplog.text


def test_a_longer_run_says_what_becomes_of_the_learning_rate(base, tmp_path, caplog):
    start = base / "checkpoints/step-6"
    train(branch(start, tmp_path / "run", "training.steps=7"))
    caplog.clear()
    with caplog.at_level(logging.INFO, "hybridlm"):
        train(load_config("train", [f"run_dir={tmp_path}/run", "training.steps=30"]))
    rates = {row["step"]: row["lr"] for row in tiny_run.records(tmp_path / "run")}
    text = next(line for line in caplog.messages if line.startswith("learning rate:"))
    assert text.startswith(f"learning rate: {rates[8]:.3g} in step 8 ({rates[7]:.3g} in the last step), "
                           f"{rates[30]:.3g} in the last step, 30")
    assert f"it rises from {rates[7]:.3g} because the curve of schedule.kind=cosine" in text


def test_changed_settings_are_refused_with_the_command_that_works(base, tmp_path):
    words = [str(base / "config.yaml"), "optimizer.lr=3e-3", "training.steps=9"]
    with pytest.raises(ConfigError, match=r"holds a different run: optimizer\.lr 0\.01 -> 0\.003") as caught:
        train(load_config(words[0], words[1:]), command=words)
    from_words = typed(str(caught.value))
    with pytest.raises(ConfigError) as caught:  # started from Python: the changes are spelled out
        train(load_config(words[0], [*words[1:], "data.mixture=[{path: a, weight: 2.0}, {path: 'b c'}]"]))
    assert "data.mixture=[{path:a,format:auto" in str(caught.value)
    assert load_config("train", typed(str(caught.value))).data.mixture[1].path == "b c"
    name = next((word for word in from_words if "=" not in word), "train")
    config = load_config(name, [word for word in from_words if "=" in word])
    config.run_dir = str(tmp_path / "run")
    assert config.branch_from == str(base)
    train(config)
    assert [row["step"] for row in tiny_run.records(tmp_path / "run")] == [9]


def test_the_advice_after_a_row_of_bad_steps_works_as_typed(tmp_path, monkeypatch):
    settings = {"steps": 5, "checkpoint_every": 2, "max_bad_steps": 1, "eval_every": 0}
    original = trainer_module.Trainer._gradients

    def poison_at(step):
        def poisoned(trainer, *args):
            if trainer.progress.step == step:
                parameter = next(trainer.model.parameters())
                parameter.register_hook(lambda grad: grad * float("nan"))
            return original(trainer, *args)
        return poisoned

    monkeypatch.setattr(trainer_module.Trainer, "_gradients", poison_at(0))
    with pytest.raises(TrainingStopped, match=r"start the same command again with a lower rate, such as "
                                              r"optimizer\.lr=0\.005"):
        train(tiny_run.config(tmp_path, **settings))
    monkeypatch.setattr(trainer_module.Trainer, "_gradients", poison_at(3))
    with pytest.raises(TrainingStopped) as caught:
        train(tiny_run.config(tmp_path, **settings, seed=4, optimizer={"lr": 0.005}))
    monkeypatch.undo()
    assert (tmp_path / "run/earlier-1/metrics.jsonl").exists()
    words = typed(str(caught.value))
    assert words == ["optimizer.lr=0.0025", "training.seed=5", f"branch_from={tmp_path}/run/checkpoints/step-2",
                     f"run_dir={tmp_path}/run-branch"]
    result = train(load_config("train", words))
    assert result.status == "finished"
    assert result.step == 5


def test_a_run_goes_on_from_its_folder_alone(base, tmp_path):
    train(branch(base / "checkpoints/step-6", tmp_path / "run", "training.steps=7", "optimizer.lr=7e-3"))
    config = load_config("train", [f"run_dir={tmp_path}/run", "training.steps=9"])
    assert (config.model.name, config.optimizer.lr, config.training.steps) == ("tiny", 7e-3, 9)
    assert train(config).step == 9
    lion = load_config("train", [f"run_dir={tmp_path}/run", "optimizer=lion", "recipe.stages.0.steps=3"])
    assert lion.optimizer.kind == "lion"
    assert not hasattr(lion.optimizer, "betaz")
    assert lion.model.name == "tiny"
    with pytest.raises(UserError):
        load_config("train", [f"run_dir={tmp_path}/run", "optimizer.lrr=3"])


def test_inspect_and_report_show_where_a_run_began(base, tmp_path, capsys):
    train(branch(base, tmp_path / "run", "training.steps=9", "optimizer.lr=2e-3"))
    capsys.readouterr()
    line = f"branch of {base}/checkpoints/step-8 (step 8): optimizer.lr 0.01 -> 0.002; training.steps 8 -> 9"
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert line in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lineage"]["step"] == 8
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "Began from" in page
    assert line.replace(">", "&gt;") in page
