"""Names on the Hugging Face hub, looked up so that a missing network is noticed within seconds.

The hub's own clients try again for half a minute and more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from threading import Thread
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

Loaded = TypeVar("Loaded")
CONNECT_TIMEOUT_S = 5.0  # looking up the address included


def is_reachable() -> bool:
    """Whether the hub, or the proxy before it, accepts a connection within CONNECT_TIMEOUT_S."""
    from huggingface_hub import constants

    url = urlsplit(getproxies().get("https") or constants.ENDPOINT)
    address = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    answered = []

    def connect() -> None:
        try:
            with closing(socket.create_connection(address, CONNECT_TIMEOUT_S)):
                answered.append(True)
        except OSError:
            pass

    thread = Thread(target=connect, daemon=True)  # nothing else bounds the time that a name takes to be looked up
    thread.start()
    thread.join(CONNECT_TIMEOUT_S)
    return bool(answered)


class NotFound(Exception):
    """A name is neither in the hub's cache nor, where it can be reached, on the hub; the text is one line."""


def look_up(load: Callable[[], Loaded]) -> Loaded:
    """Call `load` with the hub's cache alone, and if that fails with the network.

    Args:
        load: a call of `datasets`, `transformers` or another client of the hub.

    Raises:
        NotFound: `load` failed both times, or the hub cannot be reached; the text says why.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        with _offline():
            return load()
    except Exception as error:  # the libraries and their back ends raise dozens of kinds
        first = error
    if not offline and is_reachable():
        try:
            return load()
        except Exception as error:
            raise NotFound(_line(error)) from error
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    raise NotFound(f"{_line(first)}; {why}, so only what was fetched before is found") from first


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _offline() -> Iterator[None]:
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
