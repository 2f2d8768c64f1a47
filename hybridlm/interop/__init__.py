"""Checkpoints in and out: other libraries' models become ours, and ours theirs.

    model = hybridlm.interop.import_hf("Kimi-Linear-48B")       # a folder, or a transformers model
    hybridlm.interop.export_hf(model, "out")                    # AutoModelForCausalLM.from_pretrained("out")

Names load when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.interop.compare import verify as verify
    from hybridlm.interop.folders import export_checkpoint as export_checkpoint
    from hybridlm.interop.folders import export_hf as export_hf
    from hybridlm.interop.folders import import_checkpoint as import_checkpoint
    from hybridlm.interop.folders import save_checkpoint as save_checkpoint
    from hybridlm.interop.import_export import import_hf as import_hf
    from hybridlm.interop.import_export import to_hf_config as to_hf_config
    from hybridlm.interop.import_export import to_hf_model as to_hf_model
    from hybridlm.interop.surgery import add_indexer as add_indexer
    from hybridlm.interop.surgery import replace_mixers as replace_mixers

_HOMES = {
    "add_indexer": "surgery",
    "export_checkpoint": "folders",
    "export_hf": "folders",
    "import_checkpoint": "folders",
    "import_hf": "import_export",
    "replace_mixers": "surgery",
    "save_checkpoint": "folders",
    "to_hf_config": "import_export",
    "to_hf_model": "import_export",
    "verify": "compare",
}

__all__ = ["add_indexer", "export_checkpoint", "export_hf", "import_checkpoint", "import_hf", "replace_mixers",
           "save_checkpoint", "to_hf_config", "to_hf_model", "verify"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
