"""The scripts that start a run through other launchers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm.distributed.launch import free_port

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


LAUNCHERS = ["torchrun", "accelerate", "deepspeed"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(launcher, data_words, tmp_path):
    engine = "ddp" if launcher == "torchrun" else "zero1"
    done = subprocess.run(
        [ROOT / "scripts" / "launch" / f"{launcher}.sh", "model=minimax_01_tiny", "model.num_layers=2",
         f"engine={engine}", "data.tokenizer=bytes", *data_words, "training.steps=2",
         "training.batch_size=2", "training.sequence_length=32", "training.eval_batches=1",
         f"run_dir={tmp_path / 'run'}"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": PATHS, "PROCESSES": "2", "OMP_NUM_THREADS": "1",
             "MASTER_PORT": str(free_port())})
    assert done.returncode == 0, done.stderr
    session, = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert session["processes"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_port_in_use(launcher):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run([ROOT / "scripts" / "launch" / f"{launcher}.sh", "engine=zero3"], capture_output=True,
                              text=True, env={**os.environ, "PYTHON": sys.executable, "MASTER_PORT": str(port)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: MASTER_PORT: another program listens on port {port} of this machine; set "
                           "MASTER_PORT to a free one\n")


@pytest.mark.parametrize(("hosts", "says"), [
    ("# two\n127.0.0.1 slots=2\n", "error: HOSTFILE: 127.0.0.1 does not answer on its ssh port {port}; is it up?"),
    (None, "error: HOSTFILE: there is no file {file}")])
def test_hosts_of_deepspeed_that_are_not_there(hosts, says, tmp_path):
    file, port = tmp_path / "hosts", free_port()
    if hosts is not None:
        file.write_text(hosts)
    script = ROOT / "scripts" / "launch" / "deepspeed.sh"
    done = subprocess.run([script, "engine=zero3"], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, "HOSTFILE": str(file), "SSH_PORT": str(port)})
    line, = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith(says.format(port=port, file=file))


def test_slurm(tmp_path):
    """Each task is told its rank; `scontrol`, `srun` and Python are stand-ins."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho first-host\nsleep 0.3\necho second-host\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nSLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"\n')
    (tmp_path / "python").write_text('#!/bin/sh\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"\n')
    for name in ("scontrol", "srun", "python"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "launch" / "slurm.sbatch", "engine=zero3", "run_dir=with space"],
        capture_output=True, text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "SLURM_NTASKS": "16",
             "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9 1 16 first-host 20007 -m hybridlm.cli train engine=zero3 run_dir=with space\n"
