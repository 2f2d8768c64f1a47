"""Converts checkpoints: models of other libraries become ours, and ours theirs.

    model = hybridlm.interop.import_hf("Kimi-Linear-48B")       # a folder, or a transformers model
    hybridlm.interop.export_hf(model, "out")                    # AutoModelForCausalLM.from_pretrained("out")

Names are imported when they are first used, since torch and transformers take seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.interop.checkpoint_folders import export_checkpoint as export_checkpoint
    from hybridlm.interop.checkpoint_folders import export_hf as export_hf
    from hybridlm.interop.checkpoint_folders import import_checkpoint as import_checkpoint
    from hybridlm.interop.checkpoint_folders import save_checkpoint as save_checkpoint
    from hybridlm.interop.compare import verify as verify
    from hybridlm.interop.import_export import import_hf as import_hf
    from hybridlm.interop.import_export import to_hf_config as to_hf_config
    from hybridlm.interop.import_export import to_hf_model as to_hf_model
    from hybridlm.interop.router_callback import RouterBiasCallback as RouterBiasCallback
    from hybridlm.interop.router_callback import update_router_biases as update_router_biases
    from hybridlm.interop.surgery import add_indexer as add_indexer
    from hybridlm.interop.surgery import replace_mixers as replace_mixers

MODULE_OF = {
    "RouterBiasCallback": "router_callback",
    "add_indexer": "surgery",
    "export_checkpoint": "checkpoint_folders",
    "export_hf": "checkpoint_folders",
    "import_checkpoint": "checkpoint_folders",
    "import_hf": "import_export",
    "replace_mixers": "surgery",
    "save_checkpoint": "checkpoint_folders",
    "to_hf_config": "import_export",
    "to_hf_model": "import_export",
    "update_router_biases": "router_callback",
    "verify": "compare",
}

__all__ = ["RouterBiasCallback", "add_indexer", "export_checkpoint", "export_hf", "import_checkpoint", "import_hf",
           "replace_mixers", "save_checkpoint", "to_hf_config", "to_hf_model", "update_router_biases", "verify"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULE_OF[name]}"), name)
