"""Starting from a checkpoint's weights: its model, tokenizer and text files come along."""

import json
import logging
from pathlib import Path

import pytest

from hybridlm import checkpoint
from hybridlm.config.serialization import to_dict
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm.training.run import text_of_weights
from tests.support import tiny_run

EXTRA = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"temperature": 0.7}',
         "special_tokens_map.json": '{"pad_token": "<|endoftext|>"}'}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A run with a tokenizer that was trained on its text."""
    folder = tmp_path_factory.mktemp("bpe")
    return train(tiny_run.config(folder, steps=1, eval_every=0, eval_batches=0, model_options={"vocab_size": 300},
                                 data={"tokenizer": "bpe", "tokenizer_vocab_size": 300})).run_dir


@pytest.fixture(scope="module")
def imported(bpe, tmp_path_factory):
    """A checkpoint as an import leaves it: no optimizer, and files that a run does not write itself."""
    model = checkpoint.load_checkpoint(bpe)
    texts = checkpoint.model_texts({"model": to_dict(model.config)}, model.config, model.tokenizer) | EXTRA
    config = json.loads(texts["tokenizer_config.json"]) | {"pad_token": "<|endoftext|>", "chat_template": "{{ a }}"}
    texts["tokenizer_config.json"] = json.dumps(config)
    return checkpoint.write(tmp_path_factory.mktemp("imported"), 0, texts, {"model": checkpoint.unique_tensors(model)})


def settings(source, run_dir, *more):
    text = run_dir.parent / "other.py"
    text.write_text(Path(tiny_run.TEXT).read_text(encoding="utf-8") * 2, encoding="utf-8")
    return load_config("train", [
        f"init_from={source}", f"run_dir={run_dir}", f"data.path={text}", f"data.cache_dir={run_dir.parent}/cache",
        "data.validation_fraction=0", "training.steps=1", "training.sequence_length=32", "training.batch_size=2",
        *more])


def test_model_and_tokenizer_are_the_checkpoints(bpe, tmp_path, caplog):
    config = settings(bpe, tmp_path / "run")
    assert (config.model.name, config.model.vocab_size, config.data.tokenizer) == ("tiny", 300, str(bpe))
    with caplog.at_level(logging.WARNING, "hybridlm"):
        train(config)
    assert "tokenizer" not in caplog.text
    ours, theirs = (checkpoint.load_tokenizer(folder) for folder in (tmp_path / "run", bpe))
    assert ours.fingerprint == theirs.fingerprint
    small = [f"recipe.stages.{stage}.{key}=null" for stage in (0, 1)
             for key in ("sequence_length", "batch_size", "steps")]
    assert settings(bpe, tmp_path / "dsa", "recipe=dsa_tiny", *small).data.tokenizer == str(bpe)
    told = settings(bpe, tmp_path / "told", "data.tokenizer=bytes", "model=hybrid_tiny")
    assert (told.data.tokenizer, told.model.name) == ("bytes", "hybrid_tiny")
    assert settings(bpe, tmp_path / "wider", "model.max_position=128").model.max_position == 128


def test_a_byte_tokenizer_stays_bytes(tmp_path):
    run = train(tiny_run.config(tmp_path / "first", steps=1, eval_every=0, eval_batches=0)).run_dir
    assert settings(run, tmp_path / "run").data.tokenizer == "bytes"


def test_another_tokenizer_is_worth_a_warning_that_says_what_differs(bpe, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hybridlm"):
        train(settings(bpe, tmp_path / "run", "data.tokenizer=bytes"))
    assert "it differs in the vocabulary (300 and 257 ids), the merges" in caplog.text
    assert "leave data.tokenizer out" in caplog.text


def test_text_files_of_the_checkpoint_survive_training_and_branches(imported, tmp_path):
    train(settings(imported, tmp_path / "run", "training.checkpoint_every=1"))
    train(settings(imported, tmp_path / "run", "training.checkpoint_every=1", "training.steps=2"))  # resumed
    train(load_config("train", [f"branch_from={tmp_path}/run", f"run_dir={tmp_path}/branch", "training.steps=3"]))
    for run in ("run", "branch"):
        folder = checkpoint.resolve(tmp_path / run)
        assert {name: (folder / name).read_text() for name in EXTRA} == EXTRA
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert (config["pad_token"], config["chat_template"]) == ("<|endoftext|>", "{{ a }}")
    lineage = checkpoint.read_lineage(tmp_path / "branch")
    assert [entry["how"] for entry in checkpoint.lineage_steps(lineage)] == ["branch", "init"]
    # Token ids of another tokenizer mean something else: nothing but the lineage is kept.
    train(settings(imported, tmp_path / "bytes", "data.tokenizer=bytes"))
    names = {file.name for file in checkpoint.resolve(tmp_path / "bytes").iterdir()}
    assert not names & set(EXTRA)
    assert "lineage.json" in names


def test_a_run_that_has_begun_needs_the_checkpoint_no_more(imported, tmp_path):
    moved = tmp_path / "moved/step-0"
    moved.parent.mkdir()
    moved.symlink_to(imported)
    words = ["training.steps=1", "training.checkpoint_every=1"]
    train(settings(moved, tmp_path / "run", *words))
    moved.unlink()
    assert train(settings(moved, tmp_path / "run", "training.steps=2", "training.checkpoint_every=1")).step == 2


def test_a_run_that_reads_the_default_text_names_the_text_of_its_weights(bpe, imported):
    fits = ["training.sequence_length=32"]
    path = checkpoint.read_config(checkpoint.resolve(bpe))["data"]["path"]
    assert text_of_weights(load_config("train", [f"init_from={bpe}", *fits])) == f"{path}; data.path={path} takes that"
    assert text_of_weights(load_config("train", [f"init_from={bpe}", "data.path=/other", *fits])) == ""
    assert text_of_weights(load_config("train", [f"init_from={imported}", *fits])) == ""
