"""A machine with a GPU may have torch, triton, numpy and rich and nothing else of what a run needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hydra", "omegaconf", "datasets", "transformers", "accelerate", "tokenizers",
                                  "safetensors", "deepspeed", "wandb", "packaging", "pyarrow", "filelock", "pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Nothing())
"""
BENCH = '["swiglu", "--shapes", "B1 T64 H2 D16"]'


@pytest.mark.parametrize(("code", "line"), [
    ("from hybridlm_kernels.tools.doctor import main; print(main([]))", "0 failed"),
    (f"from hybridlm_kernels.tools.bench import main; print(main({BENCH}))", "against torch"),
    (f"from hybridlm.cli import main; print(main(['bench', 'kernels', *{BENCH}]))", "against torch"),
])
def test_kernels_need_no_more(code, line):
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"})
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
    assert done.stdout.splitlines()[-1] == "0"


def test_doctor_names_what_a_run_needs():
    code = """
import importlib.metadata
found = importlib.metadata.version

def version(name):
    if name in ("hydra-core", "omegaconf"):
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.version = version
from hybridlm.cli import main
print(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "COLUMNS": "150"})
    assert done.returncode == 0, done.stderr
    assert "missing: pip install 'hydra-core>=1.3,<1.4'" in done.stdout
    assert done.stdout.splitlines()[-1] == "1"
