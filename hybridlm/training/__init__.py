"""Training: stages, loop, optimizers, metrics, guards. See docs/training.md.

    from hybridlm.training import train
    result = train(hybridlm.load_config("train", ["model=kimi_linear_tiny"]))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.training.guards import TrainingStopped as TrainingStopped
    from hybridlm.training.run import RunResult as RunResult
    from hybridlm.training.run import train as train

_HOMES = {"train": "run", "RunResult": "run", "TrainingStopped": "guards"}

__all__ = ["RunResult", "TrainingStopped", "train"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
