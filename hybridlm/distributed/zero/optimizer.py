"""AdamW and Muon as one optimizer over the flat partitions of DeepSpeed's ZeRO.

AdamW works element by element and does not notice. Muon orthogonalises whole matrices: ranks put each one's momentum
together on one of them, in turn, which sends the result back. It sees gradients that are clipped already; DeepSpeed's
own Muon clips what is orthogonalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridlm.distributed.zero.partition import Fragment


class FlatOptimizer(torch.optim.Optimizer):
    """`members`: an AdamW, and a Muon whose `direction` makes a step of a matrix's momentum. One has no group, or both.

    `fragments`: where each parameter's elements are, to be set once DeepSpeed has laid them out.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]):
        super().__init__([group for member in members for group in member.param_groups], {})
        self.adamw = next((member for member in members if "betas" in member.defaults), None)
        self.muon: Any = next(member for member in members if "momentum" in member.defaults)
        self.fragments: list[Fragment] = []

    @torch.no_grad()
    def step(self, closure=None):
        """DeepSpeed calls it on all ranks alike, with the groups that are due; the others have no parameters."""
        for group in self.param_groups:
            if "betas" in group:
                assert self.adamw is not None
                self.adamw.param_groups, self.adamw.state = [group], self.state
                self.adamw.step()
                continue
            for flat in group["params"]:
                if flat.grad is not None:
                    self._muon_step(flat, flat.grad, **{key: group[key] for key in ("lr", "momentum", "weight_decay")})

    def _muon_step(self, flat: Tensor, grad: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum)
        for number, fragment in enumerate(found for found in self.fragments if found.flat is flat):
            owner = number % dist.get_world_size(fragment.group)
            matrix = fragment.whole(update, flat.device, owner)
            if owner == dist.get_rank(fragment.group):
                matrix = self.muon.direction(matrix).contiguous()  # what is sent goes by its memory
            dist.broadcast(matrix, group=fragment.group, group_src=owner)
            fragment.place(update, matrix)
        flat.mul_(1 - lr * weight_decay)
        flat.add_(update, alpha=-lr)
