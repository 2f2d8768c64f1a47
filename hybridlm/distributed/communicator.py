"""Numbers, small objects and failures that the ranks of a run exchange; tensors of the model go other ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hybridlm.errors import UserError


class Communicator:
    """One of `world_size` processes, by default the only one. All of them call its methods together, in the same order.

    >>> SINGLE_PROCESS.all_sum([1, 2]), SINGLE_PROCESS.gather("here")
    ([1, 2], ['here'])
    """

    rank = 0
    world_size = 1
    is_main = True
    device = torch.device("cpu")
    context_parallel_size = 1  # ranks that share the rows of a batch

    def all_sum(self, numbers: Sequence[int]) -> list[int]:
        """Sum each number over the global batch. Ranks that share rows (context parallel) all give the numbers of the
        complete rows, which count once."""
        if self.world_size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(summed)
        return (summed // self.context_parallel_size).tolist()

    def all_max(self, numbers: Sequence[int]) -> list[int]:
        """Return, for each number, the largest that any rank has."""
        if self.world_size == 1:
            return list(numbers)
        found = torch.tensor(numbers, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank. Values are pickled: meant for small ones, now and then."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, run: Callable[[], Any]) -> Any:
        """Call `run` on the first rank and return its result on all of them.

        Raises:
            OSError, UserError: as `run` raised them, on all ranks.
        """
        if self.world_size == 1:
            return run()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = run()
            except UserError as error:
                error.shared = True
                outcome[1] = error
            except OSError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def run_on_all(self, run: Callable[[], Any]) -> list[Any]:
        """Call `run` on every rank and return all results, by rank.

        Raises:
            OSError: as `run` raised it on one rank, on all of them.
        """
        result = error = None
        try:
            result = run()
        except OSError as failed:
            error = failed
        outcomes = self.gather((result, error))
        failures = [failed for _, failed in outcomes if failed is not None]
        if failures:
            raise failures[0]
        return [found for found, _ in outcomes]


SINGLE_PROCESS = Communicator()
