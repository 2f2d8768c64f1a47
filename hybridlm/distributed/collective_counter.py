"""Counts the bytes that one process hands to collective operations, to check the formulas of planning against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVE_BY_PREFIX = {  # kind of a collective operation by the first letters of its name in c10d
    "allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "broadcast": "broadcast", "reduce_": "reduce", "send": "send",
}


def wire_bytes(kind: str, payload: float, ranks: int) -> float:
    """Bytes that leave one rank in a collective operation, if it runs as a ring: so NCCL and gloo move large tensors.

    Args:
        kind: one of the values of `COLLECTIVE_BY_PREFIX`.
        payload: bytes of the whole tensor; of "all_to_all" and "send" the bytes that go to other ranks.
        ranks: size of the group.

    >>> wire_bytes("all_reduce", 8.0, 4)
    12.0
    """
    if kind in ("all_to_all", "send"):
        return payload
    return payload * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


class CountCollectives(TorchDispatchMode):
    """Context manager that adds the bytes of each collective operation of this thread to `payload`, by kind and size of
    the group.

    The bytes are those of the whole tensor that is reduced, gathered or scattered; of an all-to-all, those that go to
    other ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").lstrip("_")
            kind = next((kind for start, kind in COLLECTIVE_BY_PREFIX.items() if name.startswith(start)), None)
            if kind is not None:
                self._count(kind, args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        sizes = [sum(t.numel() * t.element_size() for t in _tensors(arg)) for arg in args[:2]]
        payload = max(sizes)
        if kind == "all_to_all":
            payload = sizes[1] - _kept_bytes(args[1], args[4] if isinstance(args[1], Tensor) else [], group)
        self.payload[kind, group.size()] += payload

    @property
    def sent(self) -> dict[tuple[str, int], float]:
        """Bytes that left this rank, by kind and group size."""
        return {(kind, ranks): wire_bytes(kind, payload, ranks) for (kind, ranks), payload in self.payload.items()}


def _kept_bytes(rows: Any, splits: list[int], group: dist.ProcessGroup) -> int:
    """Bytes of an all-to-all that stay on their rank."""
    pieces = rows.split(splits or len(rows) // group.size()) if isinstance(rows, Tensor) else rows
    return pieces[group.rank()].numel() * pieces[group.rank()].element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
