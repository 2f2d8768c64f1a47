import json
from pathlib import Path

import pytest

from hybridlm.config.schema import DataSourceConfig
from hybridlm.config.serialization import to_dict
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.training import train
from hybridlm.training.run_changes import check_same_run, flatten
from hybridlm.training.run_folder import RunFolder
from tests.support import tiny_run

HERE = Path("run")


def saved(folder, **options):
    return to_dict(tiny_run.config(folder, **options))


@pytest.mark.parametrize("options", [
    {"steps": 99, "eval_every": 1, "log_every": 2, "checkpoint_every": 7, "micro_batch_size": 2, "precision": "bf16"},
    {"recipe": tiny_run.stages({"name": "pretrain", "steps": 50})},
])
def test_length_and_watching_may_change(tmp_path, options):
    before = saved(tmp_path, recipe=tiny_run.stages({"name": "pretrain", "steps": 5}) if "recipe" in options else None)
    check_same_run(before, tiny_run.config(tmp_path, **options), HERE)


@pytest.mark.parametrize(("options", "words"), [
    ({"batch_size": 8}, r"training\.batch_size 4 -> 8"),
    ({"optimizer": {"lr": 1.0}}, r"optimizer\.lr 0\.01 -> 1\.0"),
    ({"data": {"tokenizer": "bpe"}}, r"data\.tokenizer 'bytes' -> 'bpe'"),
    ({"recipe": tiny_run.stages({"name": "pretrain", "lr": 3.0})}, r"recipe\.(name|stages\.0\.lr)"),
])
def test_what_is_trained_on_what_may_not(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        check_same_run(saved(tmp_path), tiny_run.config(tmp_path, **options), HERE)


def test_places_of_data_may_change(tmp_path):
    """The content of what stands there is compared when the checkpoint is read."""
    sources = [[DataSourceConfig(path=f"{place}/a.txt"), DataSourceConfig(path="stdlib")] for place in ("old", "new")]
    before = saved(tmp_path, data={"mixture": sources[0], "validation_path": "old/b.txt", "tokenizer": "old"})
    check_same_run(before, tiny_run.config(tmp_path, data={
        "mixture": sources[1], "path": "elsewhere", "validation_path": "new/b.txt", "tokenizer": "new"}), HERE)
    for other in ({"mixture": sources[1][1:]}, {"validation_path": None}, {"tokenizer": "bytes"}, {"path": "stdlib"}):
        with pytest.raises(ConfigError, match=r"holds a different run: data\."):
            check_same_run(before, tiny_run.config(tmp_path, data={
                "mixture": sources[0], "validation_path": "old/b.txt", "tokenizer": "old", **other}), HERE)


def test_keys_of_a_later_version_have_their_defaults(tmp_path):
    before = saved(tmp_path)
    del before["optimizer"]["eps"]
    check_same_run(before, tiny_run.config(tmp_path), HERE)
    with pytest.raises(ConfigError, match=r"optimizer\.eps"):
        check_same_run(before, tiny_run.config(tmp_path, optimizer={"eps": 1e-3}), HERE)


def test_model_options_are_part_of_the_run_and_other_weights_another_model(tmp_path):
    with pytest.raises(ConfigError, match=r"holds a different run: model\.init_std 0\.02 -> 0\.5"):
        check_same_run(saved(tmp_path), tiny_run.config(tmp_path, model_options={"init_std": 0.5}), HERE)
    check_same_run(saved(tmp_path), tiny_run.config(tmp_path, model_options={"name": "another"}), HERE)
    for options, words in (({"hidden_size": 64}, r"model\.hidden_size 32 -> 64"),
                           ({"num_layers": 3}, "2 layers saved, 3 asked for"),
                           ({"schedule": tiny_run.ScheduleConfig(pattern=["full"])}, "layer 0: mixer linear -> full")):
        with pytest.raises(CheckpointError, match=f"the model of the run in run has changed: {words}"):
            check_same_run(saved(tmp_path), tiny_run.config(tmp_path, model_options=options), HERE)


def abandoned(folder, **options):
    """A run folder in which a run ended before its first checkpoint."""
    config = tiny_run.config(folder, **options)
    run = RunFolder(config.run_dir)
    run.begin_session(config, {"command": "first"})
    run.metrics_file.write_text('{"step": 1}\n')
    run.log_file.write_text("out of memory\n")
    run.close()
    return run.path


def test_a_folder_without_a_checkpoint_binds_nobody(tmp_path):
    path = abandoned(tmp_path, batch_size=8)
    smaller = tiny_run.config(tmp_path, batch_size=4, steps=1, eval_every=0)
    train(smaller)
    assert {file.name for file in (path / "earlier-1").iterdir()} == {
        "config.yaml", "run.json", "metrics.jsonl", "log.txt"}
    assert (path / "earlier-1" / "log.txt").read_text() == "out of memory\n"
    assert "earlier-1" in (path / "log.txt").read_text()
    assert [row["step"] for row in tiny_run.records(path)] == [1]
    with pytest.raises(ConfigError, match=r"training\.batch_size 4 -> 8"):  # now it holds a checkpoint
        train(tiny_run.config(tmp_path, batch_size=8, steps=1))


def test_the_same_run_keeps_the_log_of_its_first_attempt(tmp_path):
    path = abandoned(tmp_path)
    run = RunFolder(path)
    run.set_aside(tiny_run.config(tmp_path))
    assert run.kept_aside is None
    assert run.log_file.read_text() == "out of memory\n"
    run.set_aside(tiny_run.config(tmp_path, resume="never"))
    assert run.kept_aside == path / "earlier-1"
    assert not run.log_file.exists()
    run.close()


def test_fewer_steps_than_were_made_are_refused(tmp_path):
    train(tiny_run.config(tmp_path, steps=3, eval_every=0, eval_batches=0))
    with pytest.raises(ConfigError, match=r"training\.steps: leaves 2 steps, and this run has made 3; expected at "
                                          r"least 3 steps; branch_from="):
        train(tiny_run.config(tmp_path, steps=2, eval_every=0, eval_batches=0))


def test_sessions_add_up(tmp_path):
    run = RunFolder(tmp_path / "run")
    for command in ("a", "b"):
        run.begin_session(tiny_run.config(tmp_path), {"command": command})
    assert [s["command"] for s in json.loads((run.path / "run.json").read_text())["sessions"]] == ["a", "b"]
    (run.path / "run.json").write_text("{")
    assert run.sessions() == []
    run.close()


def test_flatten():
    assert flatten({"a": [1, {"b": None}], "c": {}}) == {"a.0": 1, "a.1.b": None, "c": {}}
