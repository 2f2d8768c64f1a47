"""Design and pretrain hybrid language models.

    config = hybridlm.load_config("train", ["model=kimi_linear_tiny"])
    model = hybridlm.build_model(config)
    result = hybridlm.train(config)
    model = hybridlm.load_checkpoint(result.checkpoint)

A file with a kind of your own imports the decorator that registers it from here or from the room of its kind, and the
contract from there: `from hybridlm.model.mixers import MixerConfig, SequenceMixer, register_mixer`. An example is
`examples/my_mixer.py`; `--import FILE` imports such a file into any command. Names load when they are first used, so
that `import hybridlm` and the command line start at once.

>>> import hybridlm
>>> hybridlm.load_config("quickstart", ["training.steps=3"]).training.steps
3
"""

from typing import TYPE_CHECKING, Any

from hybridlm.version import __version__

if TYPE_CHECKING:
    from hybridlm.checkpoint import load_checkpoint as load_checkpoint
    from hybridlm.evaluation.probes import register_probe as register_probe
    from hybridlm.model.feed_forward import register_feed_forward as register_feed_forward
    from hybridlm.model.mixers import register_mixer as register_mixer
    from hybridlm.model.model import build_model as build_model
    from hybridlm.model.residual import register_residual as register_residual
    from hybridlm.optimizers import register_optimizer as register_optimizer
    from hybridlm.run_config import load_config as load_config
    from hybridlm.sources import register_file_reader as register_file_reader
    from hybridlm.sources import register_source as register_source
    from hybridlm.training import train as train
    from hybridlm.user_code import import_user_code as import_user_code

_HOMES = {
    "build_model": "hybridlm.model.model",
    "import_user_code": "hybridlm.user_code",
    "load_checkpoint": "hybridlm.checkpoint",
    "load_config": "hybridlm.run_config",
    "register_feed_forward": "hybridlm.model.feed_forward",
    "register_file_reader": "hybridlm.sources",
    "register_mixer": "hybridlm.model.mixers",
    "register_optimizer": "hybridlm.optimizers",
    "register_probe": "hybridlm.evaluation.probes",
    "register_residual": "hybridlm.model.residual",
    "register_source": "hybridlm.sources",
    "train": "hybridlm.training",
}

__all__ = ["__version__", "build_model", "import_user_code", "load_checkpoint", "load_config", "register_feed_forward",
           "register_file_reader", "register_mixer", "register_optimizer", "register_probe", "register_residual",
           "register_source", "train"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
