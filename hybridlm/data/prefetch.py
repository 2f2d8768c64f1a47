"""Batches made ahead of time by a thread. Batches are pure functions of their indices: nothing to save or resume."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")


def prefetch(make: Callable[[Key], Item], keys: Iterable[Key], ahead: int = 2) -> Iterator[Item]:
    """`make(key)` for every key, in order, up to `ahead` of them before they are asked for.

    What `make` raises is raised here, in its place. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=max(1, ahead))
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for key in keys:
                if stopped.is_set():
                    return
                put((True, make(key)))
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="hybridlm-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        thread.join()
