"""`hybridlm eval`, from the command line, on a run of a few steps; and its parts on a model that is not trained."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from hybridlm.checkpoint import load_checkpoint, resolve
from hybridlm.cli import main
from hybridlm.cli.eval import _parser
from hybridlm.data import PackedDataset, prepare
from hybridlm.evaluation.decode_speed import decode_speed
from hybridlm.evaluation.evaluate import run_config
from hybridlm.evaluation.perplexity import buckets, perplexity_by_position, token_losses
from hybridlm.evaluation.probes import PROBES
from hybridlm.evaluation.sparse import SPARSE_METHODS
from hybridlm.model.cost import decode_state_bytes
from hybridlm.run_config import load_config

SMALL = ["model=hybrid_tiny", "model.num_layers=2", "model.hidden_size=32", "model.schedule.ratio=1",
         "model.feed_forward={kind: dense, intermediate_size: 64}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder, and what the run said of itself."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "text").mkdir()
    for number, line in enumerate(["héllo wörld. ", "another text, longer. ", "and a third one. ", "the last. "]):
        (folder / "text" / f"{number}.txt").write_text(line * (20 + 40 * number), encoding="utf-8")
    settings = [*SMALL, f"data.path={folder}/text", f"data.cache_dir={folder}/cache", "data.validation_fraction=0.5",
                "data.tokenizer=bpe", "data.tokenizer_vocab_size=300", "training.batch_size=4",
                "training.sequence_length=48", "training.eval_batches=2", f"run_dir={folder}/run"]
    assert main(["train", *settings, "training.steps=2"]) == 0
    record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return folder, record


def evaluate(capsys, *argv):
    assert main(["eval", *map(str, argv), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_by_default_it_is_the_validation_of_the_run(run, capsys):
    folder, record = run
    report = evaluate(capsys, folder / "run", "--only", "perplexity")
    assert "decode" not in report
    found = report["perplexity"]
    assert found["tokens"] == record["validation_tokens"]
    assert found["loss"] == pytest.approx(record["validation_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(record["validation_bits_per_byte"], rel=1e-5)
    rows = found["by_position"]
    assert [(row["start"], row["stop"]) for row in rows] == [(0, 16), (16, 32), (32, 48)]
    assert sum(row["tokens"] for row in rows) == found["tokens"]
    assert sum(row["tokens"] * row["loss"] for row in rows) == pytest.approx(found["tokens"] * found["loss"])


def test_sparse_methods_stand_beside_the_dense_attention(run, capsys):
    asked = ["--sparse", "exact:budget=999", "--sparse", "streaming:budget=4,first=1", "--sparse", "snapkv:budget=4"]
    report = evaluate(capsys, run[0] / "run", "--only", "perplexity", *asked)
    full, few, behind_prompt = report["sparse"]
    assert full["loss"] == pytest.approx(report["perplexity"]["loss"], rel=1e-5)
    assert full["recall"] == pytest.approx(1.0)
    assert full["keys_read"] == full["keys_visible"] == few["keys_visible"]
    assert (full["sparse_layers"], full["softmax_layers"]) == (1, 1)
    assert few["recall"] < 1.0
    assert few["keys_read"] <= 4
    assert behind_prompt["keys_visible"] > few["keys_visible"], "queries of prompts read all keys, and do not count"
    assert main(["eval", str(run[0] / "run"), "--only", "perplexity", *asked, "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert all(row["method"] in table and f"{row['recall']:.4f}" in table for row in report["sparse"])
    assert "a method that reads all keys is dense attention" in table


def test_another_text_is_read_whole_with_the_tokenizer_of_the_checkpoint(run, capsys, tmp_path):
    folder, _ = run
    text = "something else, not seen before: zebra. " * 30
    (tmp_path / "held.txt").write_text(text, encoding="utf-8")
    other = f"data.path={tmp_path}/held.txt"
    report = evaluate(capsys, folder / "run", other, "--windows", 0, "--sequence-length", 32, "--batch-size", 3,
                      "--only", "perplexity")
    tokens = len(load_checkpoint(folder / "run").tokenizer.encode(text))
    assert report["perplexity"]["tokens"] == tokens  # each but the first, and the end of the text
    first = len(load_checkpoint(folder / "run").tokenizer.token_bytes[
        int(load_checkpoint(folder / "run").tokenizer.encode(text)[0])])
    assert report["perplexity"]["bytes"] == len(text) - first
    assert report["data"] == {"source": f"{tmp_path}/held.txt", "windows": -(-tokens // 32), "of": -(-tokens // 32)}
    held_out = evaluate(capsys, folder / "run", other, "data.validation_fraction=0.3", "--only", "perplexity")
    assert 0 < held_out["perplexity"]["tokens"] < tokens


def test_a_checkpoint_without_a_run_keeps_its_tokenizer(run, tmp_path):
    folder, _ = run
    copy = shutil.copytree(resolve(folder / "run"), tmp_path / "imported")
    text = (copy / "config.yaml").read_text(encoding="utf-8")
    start, stop = text.index("model:"), text.index("\n", text.index("published:"))
    (copy / "config.yaml").write_text(text[start:stop + 1], encoding="utf-8")
    assert run_config(copy).data.tokenizer == str(copy)
    assert run_config(resolve(folder / "run")).data.tokenizer == "bpe"


def test_decode_speed_and_state_grow_with_context(run, capsys):
    folder, _ = run
    report = evaluate(capsys, folder / "run", "--only", "decode", "--contexts", "16,64", "--decode-tokens", 4)
    assert "perplexity" not in report
    config = load_checkpoint(folder / "run").config
    assert [row["context"] for row in report["decode"]] == [16, 64]
    assert [row["state_bytes"] for row in report["decode"]] == [decode_state_bytes(config, n, 4) for n in (16, 64)]
    assert report["decode"][1]["state_bytes"] > report["decode"][0]["state_bytes"]
    assert all(row["decode_tokens_per_second"] > 0 < row["prefill_tokens_per_second"] for row in report["decode"])


def test_the_tables_say_the_same(run, capsys):
    folder, record = run
    assert main(["eval", str(folder / "run"), "--device", "cpu", "--contexts", "16", "--decode-tokens", "1"]) == 0
    out = capsys.readouterr().out
    assert f"loss {record['validation_loss']:.4f} per token" in out
    assert "tokens before" in out
    assert "decode tok/s" in out


def test_token_losses_are_those_of_the_logits(run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr("hybridlm.evaluation.perplexity.CHUNK_TOKENS", 7)
    model = load_checkpoint(folder / "run")
    config = load_config(str(resolve(folder / "run") / "config.yaml"))
    dataset = PackedDataset(prepare(config.data, progress=False).train, 40)
    batch = dataset.batch([0, 1])
    with torch.no_grad():
        logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    torch.testing.assert_close(token_losses(model, batch).flatten(), expected)
    assert model.norm._forward_hooks == {}
    report = perplexity_by_position(model.train(), [batch, batch], 40)
    assert model.training
    assert report["loss"] == pytest.approx(float(expected.sum() / (batch.targets >= 0).sum()), rel=1e-5)
    early = (batch.cu_seqlens.positions() < 16).flatten() & (batch.targets >= 0).flatten()
    assert report["by_position"][0]["tokens"] == 2 * int(early.sum())
    assert report["by_position"][0]["loss"] == pytest.approx(float(expected[early].mean()), rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))


def test_buckets_double():
    assert buckets(16) == [0]
    assert buckets(17) == [0, 16]
    assert buckets(200) == [0, 16, 32, 64, 128]


def test_decode_speed_leaves_the_model_as_it_was(run):
    model = load_checkpoint(run[0] / "run").train()
    assert decode_speed(model, [8], tokens=1, batch=2)[0]["batch"] == 2
    assert model.training


def test_probes_train_a_fresh_model_of_any_architecture(run, capsys):
    task = "mqar:num_pairs=2,key_vocab=4,value_vocab=4"
    report = evaluate(capsys, "--probe", task, "--probe", "parity", *SMALL, "--steps", 2, "--length", 12, "--lengths",
                      "12,30", "--examples", 8, "--batch-size", 4)
    assert [row["probe"] for row in report["probes"]] == ["mqar", "parity"]
    assert report["probes"][0]["parameters"]["num_pairs"] == 2
    assert list(report["probes"][1]["accuracy"]) == ["12", "30"]
    assert report["probes"][0]["batch_size"] == 4
    again = evaluate(capsys, run[0] / "run", "--probe", task, "--steps", 2, "--length", 12, "--lengths", "12,30",
                     "--examples", 8, "--batch-size", 4)
    assert again["probes"][0]["loss"] == report["probes"][0]["loss"]  # fresh weights: nothing of the run but its layers
    assert main(["eval", "--probe", "parity", *SMALL, "--steps", "1", "--length", "4", "--examples", "4"]) == 0
    assert "parity: 1 step at length 4" in capsys.readouterr().out


def test_probes_of_a_checkpoints_own_weights(run, capsys):
    task = ["--probe", "mqar:num_pairs=2,key_vocab=4,value_vocab=4", "--length", 12, "--examples", 8]
    report = evaluate(capsys, run[0] / "run", *task, "--zero-shot", "--lengths", "12,40")
    assert report["weights"] == "zero-shot"
    assert (report["probes"][0]["steps"], report["probes"][0]["loss"]) == (0, None)
    assert list(report["probes"][0]["accuracy"]) == ["12", "40"]
    tuned = evaluate(capsys, run[0] / "run", *task, "--fine-tune", "--steps", 2)
    fresh = evaluate(capsys, run[0] / "run", *task, "--steps", 2)
    assert (tuned["weights"], fresh["weights"]) == ("fine-tune", "fresh weights")
    assert tuned["probes"][0]["loss"] != fresh["probes"][0]["loss"]
    assert main(["eval", str(run[0] / "run"), *map(str, task), "--zero-shot"]) == 0
    assert "mqar: not trained" in capsys.readouterr().out


def test_help_names_every_probe_and_every_sparse_method():
    text = " ".join(_parser().format_help().split())
    assert all(name in text for name in (*PROBES, *SPARSE_METHODS))


@pytest.mark.parametrize(("argv", "words"), [
    ([], ["nothing to evaluate", "--probe NAME"]),
    (["/no/such/run"], ["no checkpoint at /no/such/run"]),
    (["RUN", "--steps", "3"], ["--steps", "goes with --probe"]),
    (["RUN", "--windows", "-1"], ["windows", "at least 0"]),
    (["RUN", "--sequence-length", "1"], ["sequence_length", "at least 2"]),
    (["RUN", "--only", "decode", "--contexts", "16,x"], ["--contexts", "16,x"]),
    (["RUN", "--only", "decode", "--contexts", "0"], ["contexts", "positive"]),
    (["RUN", "model.hidden_size=3"], ["model.hidden_size", "cannot be changed in an evaluation"]),
    (["RUN", "data.pth=x"], ["data.pth", "did you mean 'path'"]),
    (["RUN", "data.validation_fraction=0"], ["holds no text out", "data.path=..."]),
    (["RUN", "--device", "gpu"], ["--device", "'gpu'"]),
    (["--probe", "mqra"], ["mqra", "did you mean 'mqar'"]),
    (["--probe", "mqar:num_pairs"], ["--probe", "NAME:key=value"]),
    (["--probe", "mqar", "--windows", "3"], ["--windows", "without --probe"]),
    (["--probe", "mqar", "--zero-shot"], ["--zero-shot", "needs a checkpoint"]),
    (["RUN", "--probe", "s5", "--zero-shot"], ["rule of permutations", "--fine-tune"]),
    (["RUN", "--probe", "mqar", "--zero-shot", "--steps", "3"], ["--steps", "not with --zero-shot"]),
    (["RUN", "--zero-shot"], ["--zero-shot", "goes with --probe"]),
    (["RUN", "--probe", "mqar:key_vocab=500", "--zero-shot"], ["has 565 ids", "more than the checkpoint has tokens"]),
    (["RUN", "--sparse", "quests"], ["no such method", "did you mean 'quest'"]),
    (["RUN", "--sparse", "exact:budget"], ["--sparse", "NAME:key=value"]),
    (["RUN", "--sparse", "quest"], ["changes no layer of this model", "dense_layers below"]),
    (["RUN", "--sparse", "exact", "--only", "decode"], ["--sparse", "without --only decode"]),
    (["--probe", "mqar", "--sparse", "exact"], ["--sparse", "without --probe"]),
    (["RUN", "--limit", "3"], ["--limit", "goes with --tasks"]),
    (["RUN", "--tasks", "a", "--probe", "mqar"], ["--tasks", "goes without --probe"]),
    (["--probe", "mqar", "--lengths", "a"], ["--lengths", "'a'"]),
    (["--probe", "mqar", "model=hybrid_tin"], ["hybrid_tin", "did you mean 'hybrid_tiny'"]),
])
def test_a_users_mistake_is_one_line(run, capsys, argv, words):
    assert main(["eval", *(str(run[0] / "run") if word == "RUN" else word for word in argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
