"""The peers of split rows as threads of one process: the mathematics without a process group."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridlm.distributed.context_parallel import ContextParallelGroup


class ThreadMeeting:
    """Where `size` threads put down what they bring and look at what the others brought."""

    def __init__(self, size: int):
        self.size, self.barrier, self.brought = size, threading.Barrier(size, timeout=60), [None] * size

    def put(self, rank: int, x: Any) -> list[Any]:
        self.brought[rank] = x
        self.barrier.wait()
        everyone = list(self.brought)
        self.barrier.wait()
        return everyone


class ThreadShardGroup(ContextParallelGroup):
    def __init__(self, rendezvous: ThreadMeeting, rank: int):
        self.rendezvous, self.rank, self.size = rendezvous, rank, rendezvous.size
        self.handed: Counter[str] = Counter()  # bytes, by method

    def handed_over(self, method: str, x: Tensor, share: int = 1) -> list[Any]:
        self.handed[method] += x.numel() * x.element_size() // share
        return self.rendezvous.put(self.rank, x)

    def all_sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.rendezvous.put(self.rank, x.detach())).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.handed_over("all_gather", x))

    def reduce_scatter(self, x_P: Tensor) -> Tensor:
        return torch.stack([x[self.rank] for x in self.handed_over("reduce_scatter", x_P, self.size)]).sum(0)

    def all_to_all(self, x_P: Tensor) -> Tensor:
        return torch.stack([x[self.rank] for x in self.handed_over("all_to_all", x_P)])

    def shift(self, x: Tensor, step: int) -> Tensor:
        everyone, source = self.handed_over("shift", x), self.rank - step
        return everyone[source].clone() if 0 <= source < self.size else torch.zeros_like(x)


def run_on_threads(run: Callable[[ThreadShardGroup], Any], size: int) -> Sequence[Any]:
    """What `run` gives in each of `size` threads that are peers; the first error of any of them is raised."""
    rendezvous, results, errors = ThreadMeeting(size), [None] * size, []

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
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
