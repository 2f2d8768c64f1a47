"""The model: single-device code without trainer or ranks.

Names load when first used, so that `import hybridlm` takes no time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.model.generation import generate as generate
    from hybridlm.model.model import HybridLM as HybridLM
    from hybridlm.model.model import build_model as build_model
    from hybridlm.model.output import ModelOutput as ModelOutput
    from hybridlm.model.output import ModelState as ModelState
    from hybridlm.model.targets import build_targets as build_targets

_HOMES = {
    "HybridLM": "model",
    "build_model": "model",
    "ModelOutput": "output",
    "ModelState": "output",
    "build_targets": "targets",
    "generate": "generation",
}

__all__ = ["HybridLM", "ModelOutput", "ModelState", "build_model", "build_targets", "generate"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
