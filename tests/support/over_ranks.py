"""Scripts started in several processes, as a launcher starts them, and what their runs recorded."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm.distributed.launch import free_port

ROOT = Path(__file__).parents[2]


def start(number, script, *arguments, folder, limit=900.0):
    """Exit codes of `script ARGUMENTS` in that many processes, and what each has printed on standard error.

    All are killed where one fails or `limit` seconds have passed; `folder` is for what they print.
    """
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number),
              "LOCAL_WORLD_SIZE": str(number)}
    printed = [(Path(folder) / f"rank-{rank}.txt").open("w") for rank in range(number)]
    ranks = [subprocess.Popen([sys.executable, str(script), *map(str, arguments)], stderr=file,
                              stdout=subprocess.DEVNULL, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank, file in enumerate(printed)]
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
            if any(rank.returncode for rank in ranks):
                end = min(end, time.monotonic() + 10.0)  # in which the others say what they met
            time.sleep(0.1)
    finally:
        for rank, file in zip(ranks, printed, strict=True):
            rank.kill()
            file.close()
    return [rank.wait() for rank in ranks], [Path(file.name).read_text() for file in printed]


def on_ranks(number, script, *arguments, folder):
    """The same, where all must succeed."""
    codes, errors = start(number, script, *arguments, folder=folder)
    assert codes == [0] * number, "\n".join(errors)


def records(folder):
    """Of metrics.jsonl, by step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, wanted):
    """Losses, gradient norms and loads of experts at the same steps, within rounding."""
    assert [r["step"] for r in records(found)] == [r["step"] for r in records(wanted)]
    for a, b in zip(records(found), records(wanted), strict=True):
        for key, value in b.items():
            if key in ("total_loss", "grad_norm") or key.startswith(("loss", "validation_loss", "moe/load")):
                assert a[key] == pytest.approx(value, rel=1e-5), (found, key, a["step"])
