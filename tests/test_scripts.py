"""Scripts of the repository that nothing else runs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_sparse_attention_against_dense_is_measured_at_every_length(monkeypatch):
    bench_dsa = load("bench_dsa", monkeypatch)
    monkeypatch.setattr("hybridlm_kernels.bench.ROUNDS", 1)
    monkeypatch.setattr("hybridlm_kernels.bench.SECONDS", 0.0)
    widths = bench_dsa.Widths().over(16)
    row = bench_dsa.measure(widths, 48, torch.float32, "cpu")
    assert row["topk"] == 48
    assert all(value > 0 for value in row.values())
    assert bench_dsa.crossover([row | {"x": 1.2}, row | {"length": 96, "x": 0.9}], "x") == "96"
    assert bench_dsa.crossover([row | {"x": 1.2}], "x") == "above 48"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_needs_a_gpu(tmp_path):
    done = subprocess.run(["bash", SCRIPTS / "gpu_check.sh", tmp_path], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable})
    assert done.returncode == 2
    assert "finds no torch with a CUDA device" in done.stderr
