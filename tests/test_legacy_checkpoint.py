"""Checkpoints and exports of earlier versions: parameters under other names, mixers under other kinds.

`tests/data/checkpoint_format_1/step-4` was written by such a version: every kind of mixer, dense and routed
feed-forwards, multi-token prediction, and the state of Muon.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridlm import checkpoint
from hybridlm.checkpoint import folder as checkpoint_folder
from hybridlm.checkpoint.legacy_names import are_legacy, current_name
from hybridlm.config.legacy import load_saved_config
from hybridlm.config.serialization import from_dict
from hybridlm.interop import export_checkpoint, import_hf
from hybridlm.optimizers import OptimizerConfig, build_optimizer
from hybridlm.training.run import train
from tests.support import tiny_run

OLD = Path(__file__).parent / "data" / "checkpoint_format_1" / "step-4"
IDS = torch.arange(24)[None] * 7 % 257
# Logits [position, vocabulary] of IDS, computed by the version that wrote the checkpoint.
LOGITS = {(23, 0): -0.049625661224126816, (23, 3): 0.08615423738956451, (5, 100): 0.09173990786075592,
          (5, 101): 0.19144679605960846}


def old_name(name):
    """The name of format 1: what `current_name` undoes."""
    name = re.sub(r"\.(mixer|feed_forward)_norm\.", r".\1.norm.", name)
    return re.sub(r"((?:layers\.\d+|\.block)\.(?:mixer|feed_forward)\.)(?!norm\.weight$)", r"\1f.", name)


@torch.no_grad()
def test_an_old_checkpoint_computes_what_it_did():
    logits = checkpoint.load_checkpoint(OLD)(IDS).logits[0]
    for (position, token), value in LOGITS.items():
        assert float(logits[position, token]) == pytest.approx(value, abs=2e-6)


def test_the_optimizer_takes_its_old_state():
    model = checkpoint.load_checkpoint(OLD)
    config = from_dict(OptimizerConfig, load_saved_config(OLD / "config.yaml")["optimizer"], "optimizer")
    optimizers = build_optimizer(model, config)
    saved = checkpoint.checkpoint_tensors(OLD, "optimizer")
    optimizers.load_state_tensors(saved)
    loaded = optimizers.state_tensors()
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name].cpu(), tensor.read()), name
    assert "momentum_buffer/layers.0.mixer.q_proj.weight" in saved
    assert "exp_avg/mtp.0.block.feed_forward_norm.weight" in saved


def test_a_run_goes_on_from_an_old_checkpoint_bit_for_bit(tmp_path, monkeypatch):
    config = tiny_run.config(tmp_path, steps=4, checkpoint_every=2)
    train(config)
    expected = tiny_run.losses(config.run_dir)
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "step-4")
    old = run / "checkpoints" / "step-2"
    for stem in ("model", "optimizer"):
        file = old / f"{stem}.safetensors"
        save_file({old_name(name): tensor for name, tensor in load_file(file).items()}, file)
    (old / checkpoint_folder.MANIFEST).unlink()
    monkeypatch.setattr(checkpoint_folder, "FORMAT_VERSION", 1)
    checkpoint.seal(old, 2)
    monkeypatch.undo()
    assert "layers.0.mixer.f.q_proj.weight" in load_file(old / "model.safetensors")
    train(config)
    assert tiny_run.losses(config.run_dir) == expected
    names = load_file(run / "checkpoints" / "step-4" / "model.safetensors")
    assert "layers.0.mixer.q_proj.weight" in names


def test_an_old_checkpoint_is_exported_and_an_old_export_is_read(tmp_path):
    model = checkpoint.load_checkpoint(OLD)
    export_checkpoint(OLD, tmp_path / "export", family="hybridlm")
    file = tmp_path / "export" / "model.safetensors"
    assert "model.layers.0.mixer.q_proj.weight" in load_file(file)
    save_file({old_name(name): tensor for name, tensor in load_file(file).items()}, file)
    assert "model.layers.0.mixer.f.q_proj.weight" in load_file(file)
    config = tmp_path / "export" / "config.json"
    text = config.read_text()
    assert '"linear_attention"' in text
    config.write_text(text.replace('"linear_attention"', '"decay"'))
    with torch.no_grad():
        assert torch.equal(import_hf(tmp_path / "export")(IDS).logits, model(IDS).logits)


def test_names_of_this_version_stay_though_a_mixer_may_have_a_part_called_norm():
    names = ["layers.0.mixer_norm.weight", "layers.0.mixer.norm.weight", "layers.0.mixer.f.weight"]
    assert not are_legacy(names)
    assert are_legacy(["layers.0.mixer.norm.weight", "layers.0.mixer.f.q_proj.weight"])
    assert current_name("embed.weight") == "embed.weight"
    assert current_name("layers.10.feed_forward.f.experts.gate_up") == "layers.10.feed_forward.experts.gate_up"
    assert current_name("layers.0.mixer.f.norm.weight") == "layers.0.mixer.norm.weight"
