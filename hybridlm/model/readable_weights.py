"""When the weight of a linear map or an embedding may be read instead of calling its module, in one place.

Reading saves work: multi-head latent attention absorbs a projection into its queries, and the loss never holds all
logits. But only the call runs what others have put around a module: adapters (LoRA), hooks, quantised layers, weights
that are offloaded to the CPU or to disk and are on "meta" between two calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN_FORWARDS = (nn.Linear.forward, nn.Embedding.forward)


def readable_weight(module: nn.Module, device: torch.device, *, ignore_hooks: bool = False) -> Tensor | None:
    """The weight of a linear map or embedding where it is all that a call would use; None where it has to be called.

    Args:
        module: a linear map without bias, or an embedding, or what was put in its place.
        device: that of the input. A weight that lies elsewhere is moved by whoever called the module.
        ignore_hooks: read it in spite of hooks, for one that acts on the inputs or outputs of the module alone.

    Example:
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> readable_weight(linear, torch.device("cpu")) is linear.weight
        True
        >>> hook = linear.register_forward_hook(lambda module, inputs, output: 2 * output)
        >>> readable_weight(linear, torch.device("cpu")) is None
        True
    """
    replaced = type(module).forward not in _PLAIN_FORWARDS or "forward" in vars(module)
    if replaced or getattr(module, "bias", None) is not None:
        return None
    weight: Any = module.weight if "weight" in module._parameters else None
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.device != device:
        return None
    # Weights that an engine divides among processes (DeepSpeed) are collected when they are read: the engine puts a
    # dictionary of its own in the place of `_parameters`, and its hooks do nothing else.
    if ignore_hooks or type(module._parameters) is not dict:
        return weight
    hooked = (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
              or module._backward_pre_hooks)
    return None if hooked else weight


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a linear map, or what was put in its place, takes its input: that of its weight.

    fp32 where the weight has no dtype of products (a quantised layer).
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
        return weight.dtype
    return torch.float32
