import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from hybridlm import checkpoint
from hybridlm.checkpoint import folder as folder_module
from hybridlm.checkpoint import saving
from hybridlm.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.lm_head = nn.Linear(width, 7, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("bias", torch.randn(3))
        self.register_buffer("load", torch.randn(3), persistent=False)


def save(root, step, model=None):
    tensors = {"model": checkpoint.unique_tensors(model or Tied())}
    return checkpoint.write(root, step, {"trainer.json": json.dumps({"step": step})}, tensors)


def test_weights_come_back_bitwise_and_tied_ones_are_saved_once(tmp_path):
    torch.manual_seed(0)
    one, two = Tied(), Tied()
    folder = save(tmp_path, 3, one)
    assert {name for name, _ in checkpoint.read_tensors(folder, "model")} == {"embed.weight", "bias"}
    checkpoint.load_weights(two, folder)
    assert torch.equal(one.embed.weight, two.lm_head.weight)
    assert torch.equal(one.bias, two.bias)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]


def test_large_groups_are_split_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", 100)
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)}
    folder = checkpoint.write(tmp_path, 1, {}, {"model": tensors})
    assert len(list(folder.glob("model-0000*-of-00003.safetensors"))) == 3
    back = dict(checkpoint.read_tensors(folder, "model"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def truncate(folder):
    os.truncate(folder / "model.safetensors", 40)


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def alter(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(("harm", "word"), [
    (truncate, "40 bytes"), (flip, "has changed"),
    (lambda f: (f / "trainer.json").unlink(), "trainer.json is missing"),
    (lambda f: (f / "manifest.json").write_text('{"files"'), "cannot be read"),
    (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    (lambda f: alter(f / "manifest.json", '"step": 10', '"step": 11'), "manifest.json has changed"),
    (lambda f: alter(f / "manifest.json", '"format": 2', '"format": 3'), "manifest.json has changed"),
    (lambda f: alter(f / "manifest.json", '"sha256"', '"sha257"'), "manifest.json c"),
])
def test_torn_checkpoint_is_passed_over_and_named(tmp_path, caplog, harm, word):
    root = tmp_path / "checkpoints"
    old, new = save(root, 9), save(root, 10)
    harm(new)
    assert checkpoint.resolve(tmp_path) == old
    assert word in caplog.text
    assert "step-10" in caplog.text
    with pytest.raises(CheckpointError, match=word):
        checkpoint.resolve(new)


def test_resolve_takes_run_folder_checkpoints_folder_or_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, 9)
    newest = save(root, 10)
    assert [checkpoint.resolve(p) for p in (tmp_path, root, newest, str(newest))] == [newest] * 4


def test_resolve_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*that has one$"):
        checkpoint.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"hybridlm import {tmp_path} checkpoints/NAME converts$"):
        checkpoint.resolve(tmp_path)


def test_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "FORMAT_VERSION", 99)
        folder = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"format 99.*update hybridlm"):
        checkpoint.resolve(folder)


def test_failed_write_leaves_older_checkpoints_and_no_draft(tmp_path, monkeypatch):
    old = save(tmp_path, 1)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module, "_sha256", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    checkpoint.verify(old)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    torch.manual_seed(0)
    save(tmp_path, 1)
    model = Tied()
    folder = save(tmp_path, 1, model)
    assert torch.equal(dict(checkpoint.read_tensors(folder, "model"))["bias"], model.bias)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_is_no_checkpoint_until_it_is_published(tmp_path):
    save = checkpoint.Save(tmp_path, 1, {"trainer.json": "{}"}, {"model": {"w": torch.ones(3)}})
    save._writing.result()
    assert save.written
    assert checkpoint.newest(tmp_path) is None
    assert save.publish() == checkpoint.newest(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_parts_of_a_tensor_are_read_alone(tmp_path, dtype):
    whole = torch.arange(4 * 3 * 5).view(4, 3, 5).to(dtype)
    folder = checkpoint.write(tmp_path, 1, {}, {"model": {"a": whole, "step": torch.tensor(7).to(dtype)}})
    stored = checkpoint.checkpoint_tensors(folder)
    assert torch.equal(stored["step"].read(), torch.tensor(7).to(dtype))
    assert torch.equal(stored["a"].elements(13, 20), whole.flatten()[13:33])
    assert stored["a"].elements(60, 0).shape == (0,)
    second = stored["a"].chunk(2)[1]
    assert second.shape == (2, 3, 5)
    assert torch.equal(second.read(), whole[2:])
    assert torch.equal(second.elements(4, 6), whole[2:].flatten()[4:10])


def test_prune_keeps_the_newest_whole_ones(tmp_path):
    for step in (5, 90, 100, 110):
        save(tmp_path, step)
    truncate(tmp_path / "step-110")
    checkpoint.prune(tmp_path, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-110", "step-100", "step-90"}


def test_drafts_are_removed_and_never_resolved(tmp_path):
    (tmp_path / ".tmp-step-7-123").mkdir()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.remove_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_listed(tmp_path):
    folder = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"'embed.weight' is \[7, 4\] there and \[7, 5\] here"):
        checkpoint.load_weights(Tied(width=5), folder)
    with pytest.raises(CheckpointError, match=r"the model has no 'bias'.*'weight' is not in the checkpoint"):
        checkpoint.load_weights(nn.Linear(2, 2, bias=False), folder)


def test_layer_diff_names_layers():
    saved = [{"layer": i, "mixer": "kda", "kind": "delta_rule", "feed_forward": "moe"} for i in range(3)]
    now = [*saved[:1], {**saved[1], "mixer": "full", "kind": "mla"}]
    assert checkpoint.layer_diff(saved, now) == [
        "3 layers saved, 2 asked for", "layer 1: mixer kda -> full, kind delta_rule -> mla"]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    folder = save(Path(tmp_path), 1)
    assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json"}
