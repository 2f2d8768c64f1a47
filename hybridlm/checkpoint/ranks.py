"""The processes that work on a checkpoint together, as the format sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Ranks(Protocol):
    """All of them call its methods together; `hybridlm.distributed.engine.Engine` is one."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]: ...
    def together(self, run: Callable[[], Any]) -> list[Any]: ...
    def on_main(self, run: Callable[[], Any]) -> Any: ...


class Alone:
    """One process."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def together(self, run: Callable[[], Any]) -> list[Any]:
        return [run()]

    def on_main(self, run: Callable[[], Any]) -> Any:
        return run()


ALONE = Alone()
