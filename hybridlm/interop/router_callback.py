"""Router biases under trainers that are not ours: after each optimizer step they follow the loads of the experts.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[RouterBiasCallback()])

In a loop of one's own, and under accelerate: `update_router_biases(model)` after `optimizer.step()`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from hybridlm.model.model import HybridLM


def update_router_biases(model: nn.Module) -> bool:
    """Move the biases of all routers by the loads since the last call; to be called after every optimizer step.

    Loads are summed over the processes of the default group, so that all of them move their biases alike: all processes
    call it. Biases of routers whose weights are frozen stay.

    Args:
        model: a model of ours, also inside the exported class, PEFT, DistributedDataParallel or another wrapper.

    Returns:
        Whether there is a model of ours in it.

    Example:
        >>> update_router_biases(nn.Linear(2, 2))
        False
    """
    found = [module for module in model.modules() if isinstance(module, HybridLM)]
    for own in found:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for total in own.step_sums():
                dist.all_reduce(total)
        own.post_optimizer_step()
    return bool(found)


class RouterBiasCallback(TrainerCallback):
    """Calls `update_router_biases` after each optimizer step of a transformers Trainer, and of those built on it."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        update_router_biases(kwargs["model"])
