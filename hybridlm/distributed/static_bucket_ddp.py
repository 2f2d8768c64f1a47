"""The same weights on every rank: gradients summed beside the backward by DistributedDataParallel, always alike."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class StaticBucketDDP(DistributedDataParallel):
    """Its buckets are laid out once, from the last parameter to the first: about in the order of a backward.

    torch lays them out anew after the first step of each session: ranks would then sum in another order, and a resumed
    run differ in the last digits. `find_unused_parameters` would keep it from that too, but walks through the graph in
    every step, and all that train have a gradient (`check`). All ranks make it together; `alone` names parameters that
    are not summed.
    """

    def __init__(self, model: nn.Module, device: torch.device, alone: list[str]):
        self._set_params_and_buffers_to_ignore_for_model(model, alone)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            # Buffers are the routers' loads and biases, which the engine sums over ranks.
            super().__init__(model, device_ids=None if device.index is None else [device.index],
                             broadcast_buffers=False)
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in {*alone}]
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self):
        parameters, sparse = super()._build_params_for_reducer()
        return parameters[::-1], sparse[::-1]

    def check(self) -> None:
        """After the backward of a step.

        Raises:
            RuntimeError: a parameter has no gradient, for which torch waits before it sums the others of its bucket.
        """
        for name, parameter in self.trained:
            if parameter.grad is None:
                raise RuntimeError(f"'{name}' trains but got no gradient; freeze it (recipe.stages.N.trainable)")
