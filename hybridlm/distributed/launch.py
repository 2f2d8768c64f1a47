"""Starts the processes of a run on this machine, and sees to it that all end together.

A failing rank ends the others; a signal reaches all of them; the end of this process, whatever its cause, is theirs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType

from torch.distributed import TCPStore

GRACE = 60.0  # seconds that ranks have to save and leave after one of them has ended
POLL = 0.1
PR_SET_PDEATHSIG = 1  # of prctl(2)


def launch(arguments: Sequence[str], processes: int, restarts: int = 0) -> int:
    """Run `hybridlm ARGUMENTS` in `processes` ranks; returns the exit code of the first that failed, or 0.

    After a failure that is not the user's mistake (exit code 2) all ranks start again, at most `restarts` times:
    a run goes on from its last checkpoint.
    """
    for attempt in range(restarts + 1):
        with _signals() as received:
            code = _run(arguments, processes, received, attempt)
        if code in (0, 2) or received or attempt == restarts:
            return code
        print(f"a rank ended with exit code {code}; starting again from the last checkpoint "
              f"({attempt + 1} of {restarts} restarts)", file=sys.stderr)
    return code


def _run(arguments: Sequence[str], processes: int, received: list[int], attempt: int) -> int:
    # The ranks meet at a port that this process holds already, as under torchrun: nobody can take it before them.
    meeting_place = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting_place.port),
                           "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    end_with_me = partial(_die_with_parent, os.getpid())
    ranks = [subprocess.Popen([sys.executable, "-m", "hybridlm.cli", *arguments], start_new_session=True,
                              env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, preexec_fn=end_with_me)
             for rank in range(processes)]
    first, deadline, forwarded = 0, float("inf"), 0
    try:
        while None in [rank.poll() for rank in ranks]:
            for number in received[forwarded:]:
                _signal(ranks, number)
            forwarded = len(received)
            failed = next((rank.returncode for rank in ranks if rank.returncode), 0)
            if failed and not first:
                first, deadline = failed, time.monotonic() + (GRACE if received else 0.0)
            if time.monotonic() > deadline:
                _signal(ranks, signal.SIGKILL)
            time.sleep(POLL)
    finally:
        _signal(ranks, signal.SIGKILL)
    first = first or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return first if first >= 0 else 128 - first  # as a shell counts signals


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """What was received meanwhile, to be passed on."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers
              if signal.getsignal(number) is not signal.SIG_IGN}  # nohup stays in force
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent(parent: int) -> None:
    """In a new rank: a launcher that is killed leaves no orphans (Linux), and none if it was killed just before."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
