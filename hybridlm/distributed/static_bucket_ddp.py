"""DistributedDataParallel whose buckets never change, so that gradients are always summed in the same order."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class StaticBucketDDP(DistributedDataParallel):
    """Sums gradients over ranks beside the backward, in buckets laid out once from the last parameter to the first.

    torch lays buckets out anew after the first step of each session: ranks would then sum in another order, and a
    resumed run would differ in the last digits. `find_unused_parameters` would prevent that too, but walks through the
    graph in every step, and all parameters that train have a gradient (`check_gradients`).

    All ranks make it together.

    Args:
        model: weights must be the same on all ranks, but for those of `not_summed`.
        device: where the model is.
        not_summed: names of parameters whose gradients stay as they are.
    """

    def __init__(self, model: nn.Module, device: torch.device, not_summed: list[str]):
        self._set_params_and_buffers_to_ignore_for_model(model, not_summed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            # Buffers are the routers' loads and biases, which the engine sums over ranks.
            super().__init__(model, device_ids=None if device.index is None else [device.index],
                             broadcast_buffers=False)
        self.trained = [(name, p) for name, p in model.named_parameters()
                        if p.requires_grad and name not in set(not_summed)]
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self):
        parameters, sparse = super()._build_params_for_reducer()
        return parameters[::-1], sparse[::-1]

    def check_gradients(self) -> None:
        """Check that every parameter that trains has a gradient after the backward of a step.

        Raises:
            RuntimeError: a parameter has no gradient, for which torch waits before it sums the others of its bucket.
        """
        for name, parameter in self.trained:
            if parameter.grad is None:
                raise RuntimeError(f"'{name}' trains but got no gradient; freeze it (recipe.stages.N.trainable)")
