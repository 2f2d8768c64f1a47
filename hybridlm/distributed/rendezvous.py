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
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from hybridlm.distributed.communicator import Communicator
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.errors import ConfigError

MAX_DIFFERENCES_SHOWN = 4  # in one error
EXIT_MARGIN_S = 5.0  # beyond torch's own limit
POLL_INTERVAL_S = 0.2


@contextlib.contextmanager
def rendezvous(environment: RankEnvironment, seconds: float) -> Iterator[None]:
    """Surround the start of the process group, and turn its failures into errors that say what to do.

    Raises:
        ConfigError: the first process cannot be reached, others do not come, or its port is taken.
    """
    if not environment.launched:
        yield
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    absent = ConfigError("MASTER_ADDR", f"no answer within {seconds:.0f} s (engine.timeout)", got=f"{address}:{port}",
                         expected="host and port of the first process",
                         hint="is it running there, and reachable from this machine?")
    if environment.rank > 0 and not _answers(address, port, seconds):
        raise absent
    # What answers may be another program that never says a word: torch would listen to it for ever.
    exit_timer = threading.Timer(seconds + EXIT_MARGIN_S, _exit, [f"rank {environment.rank}: {absent}"])
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
            raise absent from None
        raise ConfigError("engine", f"{joined[1]} of {joined[2]} processes came to {address}:{port} within "
                          f"{seconds:.0f} s (engine.timeout)", hint="is every machine of the run up, with the same "
                          "MASTER_ADDR and MASTER_PORT?") from None
    finally:
        exit_timer.cancel()


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
