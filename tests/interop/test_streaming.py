"""Conversion holds one group of tensors, not the model: peak memory of both directions in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from hybridlm.interop.family_registry import get_family, read_model_config
from hybridlm.interop.import_export import list_our_tensors
from hybridlm.interop.safetensors_writer import SafetensorsWriter
from tests.support.hf_zoo import CASES

SHARD_BYTES = 20_000_000
CHILD = """
import sys, json
import torch
from hybridlm.interop.checkpoint_folders import import_checkpoint, export_checkpoint
torch.set_num_threads(1)
warm, source, work = sys.argv[1:]

def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key + ":")) * 1024

import_checkpoint(warm, work + "/w1")
export_checkpoint(work + "/w1", work + "/w2")
base = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
import_checkpoint(source, work + "/ours")
first = status("VmHWM") - base
open("/proc/self/clear_refs", "w").write("5")
export_checkpoint(work + "/ours", work + "/theirs", shard_bytes=20_000_000)
print(json.dumps([first, status("VmHWM") - base]))
"""


def write_random(folder: Path, hidden: int, layers: int, shard_bytes: int) -> tuple[int, int]:
    """A qwen3_moe checkpoint of random numbers; (bytes of all weights, bytes of one layer)."""
    family = get_family("qwen3_moe")
    raw = dict(CASES["qwen3_moe"][1].items()) | {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_experts": 16, "moe_intermediate_size": 2 * hidden,
        "model_type": "qwen3_moe"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = read_model_config(family, raw)
    ours = list_our_tensors(config)
    specs = [pair for r in family.rules(config) for pair in r.specs_of_theirs(ours, r.layouts[0])]
    writer = SafetensorsWriter(folder, specs, shard_bytes=shard_bytes)
    for name, spec in specs:
        writer.write(name, torch.randn(spec.shape))
    writer.finish()
    layer = sum(spec.num_bytes for name, spec in specs if ".layers.0." in name)
    return sum(spec.num_bytes for _, spec in specs), layer


def test_peak_memory_is_near_a_shard_and_a_layer(tmp_path):
    write_random(tmp_path / "warm", 32, 2, 10**9)
    total, layer = write_random(tmp_path / "source", 128, 16, SHARD_BYTES)
    assert total > 4 * SHARD_BYTES
    out = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "warm"), str(tmp_path / "source"), str(tmp_path)],
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    for peak in json.loads(out.stdout.strip().splitlines()[-1]):
        assert peak < SHARD_BYTES + layer + 10_000_000, f"{peak / 1e6:.0f} MB of {total / 1e6:.0f} MB"
