"""Starts the processes of a run on this machine, and sees to it that all end together.

A failing rank ends the others, a signal reaches all of them, and they end with this process, whatever ends it.
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

GRACE_PERIOD_S = 60.0  # for ranks to save and leave after a signal, once one of them has ended
POLL_INTERVAL_S = 0.1
PR_SET_PDEATHSIG = 1  # of prctl(2)


def launch(arguments: Sequence[str], processes: int, restarts: int = 0) -> int:
    """Run `hybridlm ARGUMENTS` in several ranks.

    Args:
        arguments: of the command line, without the program's name.
        processes: number of ranks.
        restarts: after a failure that is not the user's mistake (exit code 2) all ranks start again, at most so many
            times; a run goes on from its last checkpoint.

    Returns:
        The exit code of the first rank that failed, or 0.
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
    # The store's port belongs to this process before any rank starts, as under torchrun: no other program can take it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
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
                first, deadline = failed, time.monotonic() + (GRACE_PERIOD_S if received else 0.0)
            if time.monotonic() > deadline:
                _signal(ranks, signal.SIGKILL)
            time.sleep(POLL_INTERVAL_S)
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
    """Yield a list that collects the signals this process receives meanwhile, to be passed on."""
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
    """Let a new rank end with its launcher (Linux), also if that has ended already: no rank is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def free_port() -> int:
    """Return a port of this machine that no program listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
