"""The routed experts of a mixture: their weights, on this process or spread over several.

N tokens, D model width, E experts, A experts per token, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hybridlm.model.feed_forward.moe.config import MoEConfig
from hybridlm.model.parameter_roles import ParameterRole, matrix_role
from hybridlm_kernels import moe_experts

# Brings tokens [N, D] with their expert ids and weights [N, A] to `compute`, wherever that is, and the results back.
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
Dispatch = Callable[[Compute, Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Weights of the routed experts: gate_up [E, 2I, D] (gate rows first) and down [E, D, I].

    Where other processes hold the rest (`hold`), E counts those of `held`, and `dispatch` takes tokens to their
    experts.
    """

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__()
        experts, width = config.num_experts, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.num_experts = experts
        self.widths = {"gate_up": (2 * width, hidden_size), "down": (hidden_size, width)}
        self.held = range(experts)
        self.dispatch: Dispatch | None = None
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        device, dtype = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):  # a fused operation does not take part in autocast
            dtype = torch.get_autocast_dtype(device)
        run = self._compute if self.dispatch is None else partial(self.dispatch, self._compute)
        return run(x_ND.to(dtype), ids_NA, weights_NA)

    def _compute(self, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """`ids_NA` count from the first expert held."""
        return moe_experts(x_ND, self.gate_up.to(x_ND.dtype), self.down.to(x_ND.dtype), ids_NA, weights_NA,
                           limit=self.limit)

    def hold(self, held: range, dispatch: Dispatch) -> None:
        """Keep the experts of `held` alone."""
        for name in ("gate_up", "down"):
            whole = getattr(self, name)
            setattr(self, name, nn.Parameter(whole.detach()[held.start:held.stop].clone(), whole.requires_grad))
        self.held, self.dispatch = held, dispatch

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return {name: matrix_role(rows, columns, "expert_stack") for name, (rows, columns) in self.widths.items()}

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The values of an expert do not depend on which others are held."""
        for weight in (self.gate_up, self.down):
            whole = weight if len(weight) == self.num_experts else weight.new_empty(self.num_experts, *weight.shape[1:])
            nn.init.normal_(whole, std=std)
            if whole is not weight:
                weight.copy_(whole[self.held.start:self.held.stop])
