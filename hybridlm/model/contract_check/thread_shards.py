"""Context parallelism between threads of one process, without a process group: each thread computes one shard."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridlm.model.shard_group import AdjointShardGroup

TIMEOUT_S = 60.0  # seconds that a thread waits for the others


class ThreadRendezvous:
    """Exchange of values between `size` threads."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.values: list[Any] = [None] * size

    def put(self, rank: int, x: Any) -> list[Any]:
        """Wait until every thread has put a value.

        Returns:
            The values of all threads, by rank.
        """
        self.values[rank] = x
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class ThreadShardGroup(AdjointShardGroup):
    """The shard group of one of the threads. `sent_bytes` counts the bytes that it sends, by collective."""

    def __init__(self, rendezvous: ThreadRendezvous, rank: int):
        self.rendezvous = rendezvous
        self.rank = rank
        self.size = rendezvous.size
        self.sent_bytes: Counter[str] = Counter()

    def _send(self, method: str, x: Tensor, shards: int = 1) -> list[Any]:
        self.sent_bytes[method] += x.numel() * x.element_size() // shards
        return self.rendezvous.put(self.rank, x)

    def all_sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.rendezvous.put(self.rank, x.detach())).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._send("all_gather", x))

    def reduce_scatter(self, x_P: Tensor) -> Tensor:
        return torch.stack([x[self.rank] for x in self._send("reduce_scatter", x_P, self.size)]).sum(0)

    def all_to_all(self, x_P: Tensor) -> Tensor:
        return torch.stack([x[self.rank] for x in self._send("all_to_all", x_P)])

    def shift(self, x: Tensor, step: int) -> Tensor:
        by_rank = self._send("shift", x)
        source = self.rank - step
        return by_rank[source].clone() if 0 <= source < self.size else torch.zeros_like(x)


def run_on_threads(run: Callable[[ThreadShardGroup], Any], size: int) -> list[Any]:
    """Call `run` with the shard group of each of `size` threads, all at the same time.

    Returns:
        The results of the calls, by rank.

    Raises:
        BaseException: the first error of any thread; the others stop waiting.
    """
    rendezvous = ThreadRendezvous(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = run(ThreadShardGroup(rendezvous, rank))
        except BaseException as error:
            errors.append(error)
            rendezvous.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
