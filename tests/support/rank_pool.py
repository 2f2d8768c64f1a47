"""Processes of one process group that stay and make one check after another: starting them is most of the time.

`RankPool(2).run("tests.support.zero_checks:check_bf16")` calls the function on both ranks. As a script this file is one
of the ranks: it reads calls from standard input and writes what came of each to the file descriptor it is given.
"""

import importlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

from hybridlm.distributed.launch import free_port

ROOT = Path(__file__).parents[2]
GROUP_TIMEOUT_S = 120
ERROR_GRACE_S = 10.0  # in which the other ranks say what they met, after one has failed


class RankPool:
    """`size` ranks, started when they are first needed, and anew after a call that failed."""

    def __init__(self, size, folder):
        self.size, self.folder = size, Path(folder)
        self.ranks, self.pipes = [], []

    def run(self, function, *arguments, limit=300.0):
        """Call `module:function` with JSON arguments on all ranks; returns what each gave, by rank.

        Raises:
            AssertionError: the call failed on a rank, or took longer than `limit` seconds; with what the ranks said.
        """
        self._submit(function, arguments)
        results = self._results(limit)
        failed = [text for kind, text in results.values() if kind == "error"]
        if failed or len(results) < self.size:  # the ranks may be stuck
            codes, said = self.stop()
            raise AssertionError("\n".join([f"{function}: exit codes {codes}", *failed, *said]))
        return [results[rank][1] for rank in range(self.size)]

    def run_to_the_end(self, function, *arguments, limit=60.0):
        """Call a function that ends the processes; returns their exit codes and what they said, by rank."""
        self._submit(function, arguments)
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and any(rank.poll() is None for rank in self.ranks):
            time.sleep(0.1)
        return self.stop()

    def stop(self):
        """End the processes; returns their exit codes and the last of what they said, by rank."""
        for rank in self.ranks:
            rank.kill()
        codes = [rank.wait() for rank in self.ranks]
        for pipe in self.pipes:
            os.close(pipe)
        said = [(self.folder / f"rank-{rank}.txt").read_text()[-5000:] for rank in range(len(self.ranks))]
        self.ranks, self.pipes = [], []
        return codes, said

    def _submit(self, function, arguments):
        if not self.ranks:
            self._start()
        call = json.dumps([function, arguments]) + "\n"
        for rank in self.ranks:
            rank.stdin.write(call.encode())
            rank.stdin.flush()

    def _start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        shared = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
                  "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                  "WORLD_SIZE": str(self.size), "LOCAL_WORLD_SIZE": str(self.size)}
        for rank in range(self.size):
            reading, writing = os.pipe()
            with (self.folder / f"rank-{rank}.txt").open("w") as said:
                self.ranks.append(subprocess.Popen(
                    [sys.executable, "-m", "tests.support.rank_pool", str(writing)], stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL, stderr=said, pass_fds=[writing], cwd=ROOT,
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            os.close(writing)
            self.pipes.append(reading)

    def _results(self, limit):
        """(kind, value) by rank, of those that have answered within `limit` seconds or soon after one has failed."""
        results, received, deadline = {}, dict.fromkeys(self.pipes, b""), time.monotonic() + limit
        while len(results) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = [pipe for pipe in self.pipes if self.pipes.index(pipe) not in results]
            for pipe in select.select(waiting, [], [], min(left, 1.0))[0]:
                chunk, rank = os.read(pipe, 2**16), self.pipes.index(pipe)
                received[pipe] += chunk
                if received[pipe].endswith(b"\n"):
                    results[rank] = json.loads(received[pipe])
                elif not chunk:
                    results[rank] = ("error", f"rank {rank} has ended")
            if any(kind == "error" for kind, _ in results.values()):
                deadline = min(deadline, time.monotonic() + ERROR_GRACE_S)
        return results


TRAIN = "tests.support.rank_pool:train"


def train(*words):
    """One `hybridlm train` on all ranks."""
    from hybridlm.cli import main

    code = main(["train", *words])
    assert code == 0, (words, code)


def end_with(parent):
    """End this rank when the process that started it has ended, also in the middle of a collective operation."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def serve(descriptor):
    """Answer calls until standard input ends."""
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    for line in sys.stdin:
        name, arguments = json.loads(line)
        module, _, function = name.partition(":")
        try:
            answer = ("value", getattr(importlib.import_module(module), function)(*arguments))
        except BaseException:
            answer = ("error", traceback.format_exc())
        os.write(descriptor, json.dumps(answer).encode() + b"\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
