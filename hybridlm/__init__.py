"""Design and pretrain hybrid language models.

    config = hybridlm.load_config("train", ["model=kimi_linear_tiny"])
    model = hybridlm.build_model(config)
    result = hybridlm.train(config)
    model = hybridlm.load_checkpoint(result.checkpoint)

A mixer or feed-forward of your own needs `register_mixer` or `register_feed_forward` and the contracts beside them;
`examples/my_mixer.py` is one. Names load when they are first used, so that `import hybridlm` and the command line start
at once.
"""

from typing import TYPE_CHECKING, Any

from hybridlm.version import __version__

if TYPE_CHECKING:
    from hybridlm.checkpoint import load_checkpoint as load_checkpoint
    from hybridlm.model.model import build_model as build_model
    from hybridlm.run_config import load_config as load_config
    from hybridlm.training import train as train

_HOMES = {
    "build_model": "hybridlm.model.model",
    "load_checkpoint": "hybridlm.checkpoint",
    "load_config": "hybridlm.run_config",
    "train": "hybridlm.training",
}

__all__ = ["__version__", "build_model", "load_checkpoint", "load_config", "train"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
