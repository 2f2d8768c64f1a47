"""The shards of the same rows as threads of one process: context parallelism without a process group."""

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
    """The place where `size` threads put what they bring and see what the others brought."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.brought: list[Any] = [None] * size

    def put(self, rank: int, x: Any) -> list[Any]:
        """Wait until every thread has brought something; returns all of it, by rank."""
        self.brought[rank] = x
        self.barrier.wait()
        everyone = list(self.brought)
        self.barrier.wait()
        return everyone


class ThreadShardGroup(AdjointShardGroup):
    """The shard group of one of the threads. `handed` counts the bytes that it hands over, by method."""

    def __init__(self, rendezvous: ThreadRendezvous, rank: int):
        self.rendezvous, self.rank, self.size = rendezvous, rank, rendezvous.size
        self.handed: Counter[str] = Counter()

    def _hand_over(self, method: str, x: Tensor, shards: int = 1) -> list[Any]:
        self.handed[method] += x.numel() * x.element_size() // shards
        return self.rendezvous.put(self.rank, x)

    def all_sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.rendezvous.put(self.rank, x.detach())).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._hand_over("all_gather", x))

    def reduce_scatter(self, x_P: Tensor) -> Tensor:
        return torch.stack([x[self.rank] for x in self._hand_over("reduce_scatter", x_P, self.size)]).sum(0)

    def all_to_all(self, x_P: Tensor) -> Tensor:
        return torch.stack([x[self.rank] for x in self._hand_over("all_to_all", x_P)])

    def shift(self, x: Tensor, step: int) -> Tensor:
        everyone, source = self._hand_over("shift", x), self.rank - step
        return everyone[source].clone() if 0 <= source < self.size else torch.zeros_like(x)


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
