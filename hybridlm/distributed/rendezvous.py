"""How the processes of a run find each other, and what they must have in common before the first step."""

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

NAMED = 4  # differences that an error names
MARGIN = 5.0  # seconds beyond torch's own limit
POLL = 0.2


@contextlib.contextmanager
def rendezvous(world: RankEnvironment, seconds: float) -> Iterator[None]:
    """Around the start of the process group.

    Raises:
        ConfigError: the first process cannot be reached, others do not come, or its port is taken.
    """
    if not world.launched:
        yield
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    absent = ConfigError("MASTER_ADDR", f"no answer within {seconds:.0f} s (engine.timeout)", got=f"{address}:{port}",
                         expected="host and port of the first process",
                         hint="is it running there, and reachable from this machine?")
    if world.rank > 0 and not _answers(address, port, seconds):
        raise absent
    # What answers may be another program that never says a word: torch would listen to it for ever.
    patience = threading.Timer(seconds + MARGIN, _leave, [f"rank {world.rank}: {absent}"])
    patience.daemon = True
    patience.start()
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
        patience.cancel()


def _answers(address: str, port: str, seconds: float) -> bool:
    """Whether somebody accepts connections there, by the deadline."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=left):
            return True
        time.sleep(POLL)
    return False


def _leave(why: str) -> None:
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(ConfigError.exit_code)


def check_same(ranks: Communicator, what: str, mine: Mapping[str, Any], hint: str) -> None:
    """All processes must have brought the same; what differs is asked for only then.

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
    more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
    error = ConfigError("engine", f"rank {rank} has {what} of its own: {', '.join(differ[:NAMED])}{more}", hint=hint)
    error.shared = True
    raise error
