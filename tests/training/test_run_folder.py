import json
from pathlib import Path

import pytest

from hybridlm.config.schema import DataSourceConfig
from hybridlm.config.serialization import to_dict
from hybridlm.errors import CheckpointError, ConfigError
from hybridlm.training.run_folder import RunFolder, check_same_run, flatten
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


def test_model_options_are_part_of_the_architecture(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.init_std 0\.02 -> 0\.5"):
        check_same_run(saved(tmp_path), tiny_run.config(tmp_path, model_options={"init_std": 0.5}), HERE)
    check_same_run(saved(tmp_path), tiny_run.config(tmp_path, model_options={"name": "another"}), HERE)


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
