"""The start of a process group: processes find each other, or say why not, and compare what must be the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hybridlm.distributed.communicator import Communicator
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.errors import ConfigError

MAX_DIFFERENCES_SHOWN = 4  # in one error
EXIT_MARGIN_S = 5.0  # beyond torch's own limit
POLL_INTERVAL_S = 0.2
RESOLVE_PATIENCE_S = 60.0  # for a name service that learns of a machine only when it is up (pods of Kubernetes)
SHARED_FOLDER_PATIENCE_S = 10.0


@contextlib.contextmanager
def rendezvous(environment: RankEnvironment, seconds: float) -> Iterator[None]:
    """Surround the start of the process group, and turn its failures into errors that say what to do.

    Raises:
        ConfigError: the first process cannot be reached, others do not come, or its port is taken.
    """
    if not environment.launched or environment.size == 1:  # one process waits for nobody
        yield
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    check_master(address, port, seconds, is_first=environment.rank == 0)
    # What answers may be another program that never says a word: torch would listen to it for ever.
    apart = ConfigError(
        "engine", f"{address}:{port} answers, but the processes did not meet within {seconds:.0f} s (engine.timeout)",
        hint="is it the first process of this run? are all ports open between the machines, and is no machine's own "
             "name that of its loopback? GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME name the network to use")
    exit_timer = threading.Timer(seconds + EXIT_MARGIN_S, _exit, [f"rank {environment.rank}: {apart}"])
    exit_timer.daemon = True
    exit_timer.start()
    try:
        yield
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError("MASTER_PORT", "another program listens on this port", got=port,
                              expected="a free port of the first machine") from None
        joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
        if joined is None:
            raise apart from None
        raise ConfigError("engine", f"{joined[1]} of {joined[2]} processes came to {address}:{port} within "
                          f"{seconds:.0f} s (engine.timeout)", hint="is every machine of the run up, with the same "
                          "MASTER_ADDR and MASTER_PORT?") from None
    finally:
        exit_timer.cancel()


def check_master(address: str, port: str, seconds: float, *, is_first: bool) -> None:
    """Check that this machine can reach the first process, and wait for it for a while.

    Args:
        address: its host, MASTER_ADDR.
        port: its port, MASTER_PORT.
        seconds: how long to wait for an answer.
        is_first: this is the first process: only the name is checked.

    Raises:
        ConfigError: no port, a name without an address, or no answer.
    """
    if not port.isdigit():
        raise ConfigError("MASTER_PORT", "must be a number", got=port, expected="a free port of the first machine")
    if not _resolves(address, min(seconds, RESOLVE_PATIENCE_S)):
        raise ConfigError("MASTER_ADDR", f"{socket.gethostname()} cannot find a host of this name", got=address,
                          expected="a name or an address of the first machine that all machines know",
                          hint=f"`getent hosts {address}` must answer on each of them")
    if not is_first and not _answers(address, port, seconds):
        raise ConfigError("MASTER_ADDR", f"no answer within {seconds:.0f} s (engine.timeout)", got=f"{address}:{port}",
                          expected="host and port of the first process",
                          hint="is it running there, and reachable from this machine?")


def _resolves(address: str, seconds: float) -> bool:
    """Tell whether this machine finds an address for the name within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, UnicodeError):
            socket.getaddrinfo(address, None)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL_S)


def _answers(address: str, port: str, seconds: float) -> bool:
    """Tell whether a program accepts connections at the address within `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=left):
            return True
        time.sleep(POLL_INTERVAL_S)
    return False


def _exit(why: str) -> None:
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(ConfigError.exit_code)


def check_same(ranks: Communicator, what: str, mine: Mapping[str, Any], hint: str) -> None:
    """Check that all processes have the same mapping; only digests travel unless one differs.

    Args:
        ranks: the processes.
        what: what the mapping is, for the error ("versions").
        mine: this process's mapping.
        hint: what to do about a difference.

    Raises:
        ConfigError: on all of them, naming the first rank that differs from rank 0, and in what.
    """
    digests = ranks.gather(hashlib.sha256(json.dumps(mine, sort_keys=True, default=str).encode()).hexdigest())
    rank = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if rank is None:
        return
    found = ranks.gather(dict(mine))
    first, other = found[0], found[rank]
    differ = [f"{key} {other.get(key)} (rank 0: {first.get(key)})" for key in sorted(first.keys() | other.keys())
              if first.get(key) != other.get(key)]
    more = f" and {len(differ) - MAX_DIFFERENCES_SHOWN} more" if len(differ) > MAX_DIFFERENCES_SHOWN else ""
    shown = ", ".join(differ[:MAX_DIFFERENCES_SHOWN])
    error = ConfigError("engine", f"rank {rank} has {what} of its own: {shown}{more}", hint=hint)
    error.shared = True
    raise error


def check_shared_folder(ranks: Communicator, folder: Path, key: str) -> None:
    """Check that all processes see the same folder: each of them will write into it.

    Args:
        ranks: the processes.
        folder: this process's path of it; paths may differ between machines.
        key: the setting that names it, for the error.

    Raises:
        ConfigError: on all of them, naming a machine that does not see what the first one writes there.
    """
    if ranks.world_size == 1:
        return
    mark = ranks.on_main(lambda: _leave_mark(folder))
    seen = ranks.gather((socket.gethostname(), _appears(folder / mark)))
    ranks.on_main(lambda: (folder / mark).unlink(missing_ok=True))
    missing = next((host for host, found in seen if not found), None)
    if missing is not None:
        error = ConfigError(key, f"is on {missing} not the folder that it is on {seen[0][0]}, where the first process "
                            "is", got=str(folder), expected="a folder on a file system that all machines share")
        error.shared = True
        raise error


def _leave_mark(folder: Path) -> str:
    name = f".seen-by-all-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def _appears(file: Path) -> bool:
    """Tell whether a file is there, or comes within the time that network file systems keep what they know."""
    deadline = time.monotonic() + SHARED_FOLDER_PATIENCE_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True
