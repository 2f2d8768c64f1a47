"""`hybridlm tokenizer`, `hybridlm prepare` without a model, and tokenizers of runs and checkpoints."""

import gzip
import json

import pytest

from hybridlm.cli import main
from hybridlm.config.schema import DataConfig
from hybridlm.data import load_tokenizer, prepare
from hybridlm.errors import ConfigError, DataError
from hybridlm.run_config import load_data_config

TEXT = "".join(f"line {i} of a text that is read, {i % 7} times\n" for i in range(400))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "öäü " * 300}).encode()))
    return tmp_path


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_gives_the_tokenizer_of_a_run(corpus, capsys):
    code, out, _ = run(capsys, "tokenizer", "train", "texts/", "--vocab-size", 300, "--to", "tok", "--json")
    report = json.loads(out)
    prepared = prepare(DataConfig(path="texts/", tokenizer="bpe", tokenizer_vocab_size=300), progress=False)
    assert (code, report["vocab_size"], report["fingerprint"]) == (0, 300, prepared.tokenizer.fingerprint)
    assert load_tokenizer("tok").fingerprint == report["fingerprint"]
    code, out, _ = run(capsys, "tokenizer", "train", "data.path=texts/", "data.tokenizer_vocab_size=300", "--to", "two")
    assert code == 0
    assert "use it with data.tokenizer=two model.vocab_size=300" in out
    assert load_tokenizer("two").fingerprint == report["fingerprint"]
    assert prepare(DataConfig(path="texts/", tokenizer="two"), progress=False).fingerprint == prepared.fingerprint


def test_train_on_several_paths(corpus, capsys):
    assert run(capsys, "tokenizer", "train", "texts/", "more.jsonl.gz", "--vocab-size", 400, "--to", "tok")[0] == 0
    assert len(load_tokenizer("tok").encode("öäü öäü")) < 6


@pytest.mark.parametrize(("words", "said"), [
    (["train", "texts/", "--vocab-size", "100", "--to", "tok"], "at least 257"),
    (["train", "nowhere/", "--vocab-size", "300", "--to", "tok"], "nowhere/: no such file or folder"),
    (["train", "texts/", "data.path=more.jsonl.gz", "--to", "tok"], "stands beside data.path"),
    (["train", "texts/", "data.tokenizr_vocab_size=300", "--to", "tok"], "did you mean"),
    (["train", "texts/", "--to", "old"], "already holds a tokenizer"),
    (["show", "nowhere/tokenizer.json"], "no such file or folder"),
    (["show", "bytes", "--file", "gone.txt"], "gone.txt: no such file"),
    (["trian"], "invalid choice"), ([], "the following arguments are required")])
def test_mistakes_are_one_line(corpus, capsys, words, said):
    load_tokenizer("bytes").save("old")
    code, _, err = run(capsys, "tokenizer", *words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_show(corpus, capsys):
    _, out, _ = run(capsys, "tokenizer", "show", "bytes", "--text", "né", "--file", "texts/", "--json")
    report = json.loads(out)
    assert (report["vocab_size"], report["merges"], report["special_tokens"]) == \
        (257, 0, [{"id": 256, "token": "<|endoftext|>"}])
    assert [piece["id"] for piece in report["pieces"]] == list("né".encode())
    size = len(TEXT.encode())
    assert report["file"] == {"path": "texts/", "documents": 1, "bytes": size, "tokens": size + 1,
                              "bytes_per_token": size / (size + 1)}
    code, out, _ = run(capsys, "tokenizer", "show", "bytes", "--text", "né", "--file", "more.jsonl.gz")
    assert code == 0
    assert "257 ids" in out
    assert "3 tokens:" in out
    assert "2,100 bytes, 2,101 tokens" in out


def test_prepare_needs_no_model(corpus, capsys):
    """The vocabulary of the default model does not matter, nor does a recipe whose checkpoint is not there yet."""
    words = ["data.path=texts/", "data.tokenizer=bpe", "data.tokenizer_vocab_size=8192"]
    code, out, _ = run(capsys, "prepare", *words, "recipe=dsa_tiny", "model.vocab_size=257")
    assert code == 0
    assert "bytes per token; a model needs model.vocab_size=" in out
    assert load_data_config("train", words) == DataConfig(path="texts/", tokenizer="bpe", tokenizer_vocab_size=8192)
    with pytest.raises(ConfigError, match="did you mean 'text_field'"):
        load_data_config("train", ["data.text_fild=body"])


def test_tokenizers_of_runs_and_checkpoints(tmp_path):
    first, second = load_tokenizer("bytes"), prepare_bpe(tmp_path)
    run_folder = tmp_path / "run"
    for step, tokenizer in ((9, first), (10, second)):
        tokenizer.save(run_folder / "checkpoints" / f"step-{step}")
    for folder in (run_folder, run_folder / "checkpoints", run_folder / "checkpoints" / "step-10"):
        assert load_tokenizer(folder).fingerprint == second.fingerprint
    assert load_tokenizer(run_folder / "checkpoints" / "step-9").fingerprint == first.fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer\.json in this folder or in a checkpoint of it"):
        load_tokenizer(tmp_path / "empty")


def prepare_bpe(folder):
    (folder / "text.txt").write_text(TEXT)
    config = DataConfig(path=str(folder / "text.txt"), tokenizer="bpe", tokenizer_vocab_size=280,
                        cache_dir=str(folder / "cache"))
    return prepare(config, progress=False).tokenizer
