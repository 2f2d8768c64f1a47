"""A real Slurm and several hosts on this machine, by the scripts of scripts/dev/; skipped where they cannot run."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "scripts" / "dev" / "local_slurm.sh"
HOSTS = ROOT / "scripts" / "dev" / "local_hosts.sh"
PATIENCE_S = 240.0  # for what takes some seconds on a quiet machine
TINY = ["model=hybrid_tiny", "model.num_layers=2", "training.sequence_length=32", "training.batch_size=2",
        "training.eval_batches=1", "data.tokenizer=bytes", "engine.device=cpu"]


def require(*programs):
    """Skip the test where a program is missing or the user is not root."""
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=search) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (apt-get install slurm-wlm munge iproute2 nftables)")
    if os.geteuid() != 0:
        pytest.skip("only root starts slurmd and makes network namespaces")


def environment(**more):
    """The environment of a run: this checkout's packages, this Python."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1", **more}


def data_words(folder):
    """A small text in `folder`, as settings of a run."""
    for name in ("decoder", "encoder"):
        (folder / f"{name}.txt").write_text(Path(json.__file__).with_name(f"{name}.py").read_text())
    return [f"data.path={folder / 'decoder.txt'}", f"data.validation_path={folder / 'encoder.txt'}",
            f"data.cache_dir={folder / 'cache'}"]


def wait_for(condition, what):
    """Wait until the function returns something true, and return it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"waited {PATIENCE_S:.0f} s for {what}")


def steps_done(run_dir):
    """The last step in a run's metrics; 0 before the first."""
    file = Path(run_dir) / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def processes_with(text):
    """Ids of processes whose command line contains the text, such as the run folder of a test, and their variables."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit() and int(entry.name) != os.getpid() and text in (entry / "cmdline").read_text():
                variables = (entry / "environ").read_text().split("\0")
                found[int(entry.name)] = dict(word.split("=", 1) for word in variables if "=" in word)
    return found


@pytest.fixture(scope="module")
def slurm():
    """A running Slurm with two nodes; its configuration is in SLURM_CONF while the module's tests run."""
    require("slurmctld", "slurmd", "munged", "srun", "sbatch")
    folder = tempfile.mkdtemp(prefix="slurm-")  # short: sockets have paths of 100 letters at most
    subprocess.run([SLURM, "start", folder], check=True, timeout=PATIENCE_S, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        yield folder
    subprocess.run([SLURM, "stop", folder], check=True, timeout=PATIENCE_S)
    shutil.rmtree(folder)


@pytest.fixture
def hosts():
    """The names of two hosts that reach each other."""
    require("ip", "unshare", "nft")
    prefix = f"h{os.getpid() % 10000}x"
    subprocess.run([HOSTS, "start", prefix], check=True, timeout=60)
    yield [f"{prefix}1", f"{prefix}2"]
    subprocess.run([HOSTS, "stop", prefix], check=True, timeout=60)
