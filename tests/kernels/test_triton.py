"""Triton kernels without a GPU: the tests of tests/triton interpreted, and every kernel compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm_kernels.triton_support import INSTALLED, INTERPRETED

TESTS = Path(__file__).parents[1] / "triton"
# Files that run in one interpreted process, so that few processes start and two of them take about as long.
TOGETHER = (("test_delta_rule.py", "test_linear_attention.py", "test_half_precision.py", "test_short_conv.py"),
            ("test_training.py", "test_tuning.py", "test_moe.py"))
OTHERS = tuple(sorted({path.name for path in TESTS.glob("test_*.py")} - {name for names in TOGETHER for name in names}))

pytestmark = pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, and TRITON_INTERPRET unset")


def run(*command, **env):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=plain | env)


@pytest.mark.parametrize("files", [*TOGETHER, OTHERS], ids=["recurrences", "training", "others"])
def test_interpreted(files):
    done = run("-m", "pytest", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_without_spills():
    """For Hopper and heads of 128, which need the most registers; the command alone builds for Blackwell and 64 too."""
    done = run("-m", "hybridlm_kernels.tools.compile_check", "--json", "--targets", "sm_90", "--head-dims", "0", "128")
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(done.stdout)
    assert rows
    print("\n".join(f"{r['operation']} {r['label']} {r['target']}: {r['registers']} registers, {r['spilled']} B "
                    f"spilled, {r['shared']} B shared" for r in rows))
    assert not [row for row in rows if row["problem"]]
    assert all(row["registers"] > 0 for row in rows)


def test_compile_check_refuses_interpreted_kernels():
    done = run("-m", "hybridlm_kernels.tools.compile_check", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.strip() == "compile check: unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
