"""Scripts of the repository that nothing else runs."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridlm_kernels.tools.bench import Machine, Timing

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / "dev" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_sparse_attention_against_dense_is_measured_at_every_length(monkeypatch):
    bench_dsa = load("bench_dsa", monkeypatch)
    monkeypatch.setattr("hybridlm_kernels.tools.bench.ROUNDS", 1)
    monkeypatch.setattr("hybridlm_kernels.tools.bench.READING_SECONDS", 0.0)
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


MACHINE = Machine("cuda", "a GPU", "bfloat16", 4e12, 6e14, 1, "2.11.0", "3.6.0")
TIMED = Timing("delta_rule", "GDN", "B1 T8192 H96 D128", "triton", 1.0, 4.0, peak_mib=300.0)
UNTIMED = dataclasses.replace(TIMED, label="KDA", backend="-", problem="left out: no time was left")
BROKEN = dataclasses.replace(TIMED, problem="RuntimeError: illegal", failed=True)


def kernels_json(timings):
    return json.dumps({"machine": dataclasses.asdict(MACHINE), "rows": [dataclasses.asdict(t) for t in timings]})


@pytest.mark.parametrize(("tests", "timings", "code", "verdict"), [
    (0, [TIMED], 0, "all well"), (5, [TIMED], 0, "all well"),
    (124, [TIMED], 3, "nothing wrong, but 1 checks had no time"),
    (0, [TIMED, UNTIMED], 3, "nothing wrong, but 1 checks had no time"),
    (1, [TIMED, UNTIMED], 1, "wrong: test_moe"),
    (0, [BROKEN], 1, "wrong: bench: delta_rule, GDN, B1 T8192 H96 D128, triton"),
    (0, [], 1, "wrong: bench: no times, see kernels.txt")])
def test_gpu_check_says_what_is_wrong_and_what_had_no_time(tests, timings, code, verdict, tmp_path, monkeypatch):
    (tmp_path / "kernels.json").write_text(kernels_json(timings))
    (tmp_path / "test_moe.code").write_text(f"{tests}\n")
    (tmp_path / "test_moe.txt").write_text("first\nlast | line\n")
    found, page, found_code = load("gpu_summary", monkeypatch).summarise(tmp_path, "a command", 7)
    assert (found["verdict"], found_code) == (verdict, code)
    assert page.startswith(f"# GPU check: {verdict}\n\n`a command`, 7 s, ")
    assert "last / line |" in page
    assert ("a GPU, bfloat16" in page) == bool(timings)
    assert len(found["commit"]) >= 40 or "no git" in found["commit"]
    assert found["versions"]["torch"] == torch.__version__


def test_gpu_check_runs_every_part(tmp_path):
    """With a python that computes nothing, but says what it was to do."""
    (tmp_path / "kernels.json").write_text(kernels_json([TIMED]))
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
  *check_cases*) echo delta_rule swiglu ;;
  *gpu_summary.py*) exec {sys.executable} "$@" ;;
  *hybridlm_kernels.tools.bench*) cat {tmp_path}/kernels.json ;;
  *) echo "$* tuned: $HYBRIDLM_TUNE" ;;
esac
""")
    python.chmod(0o755)
    results = tmp_path / "results"
    done = subprocess.run(["bash", SCRIPTS / "gpu_check.sh"], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": str(results)})
    assert done.returncode == 0, done.stderr
    found = json.loads((results / "summary.json").read_text())
    files = {path.stem for path in (SCRIPTS.parent / "tests" / "triton").glob("test_*.py")} - {"test_bfloat16"}
    assert {row["check"] for row in found["checks"]} > {
        "doctor_delta_rule", "doctor_swiglu", "kernels", "bf16_rows_delta_rule", "dsa"} | files
    assert "tests/triton/test_moe.py tuned: 0 |" in (results / "summary.md").read_text()
