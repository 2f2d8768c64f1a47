"""Memory of optimizer state, from the configs of a model and of an optimizer."""

from __future__ import annotations

import torch

from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters
from hybridlm.model.model import HybridLM
from hybridlm.optimizers.contract import OptimizerConfig
from hybridlm.optimizers.roles import fp32_names, parameter_roles
from hybridlm.tensor_storage import full_shape

_cache: dict[tuple[str, str], int] = {}  # by how the configs print


def optimizer_state_bytes(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of optimizer state when all parameters of the model train; counts of steps are not counted.

    Where the state depends on roles or shapes, the model is built without memory (a second for hundreds of layers)
    and the result is kept.
    """
    per_element = optimizer.bytes_per_element
    if per_element is not None:
        return per_element * count_parameters(model).total_with_mtp
    key = (repr(model), repr(optimizer))
    if key not in _cache:
        with torch.device("meta"):
            _cache[key] = state_bytes(HybridLM(model), optimizer)
    return _cache[key]


def state_bytes(model: torch.nn.Module, optimizer: OptimizerConfig) -> int:
    """Bytes of optimizer state of the trainable parameters of a built model."""
    kept_fp32 = set(fp32_names(model))
    roles = parameter_roles(model)
    return sum(optimizer.rule_for(roles[name], name in kept_fp32).state_bytes(full_shape(parameter))
               for name, parameter in model.named_parameters() if parameter.requires_grad)
