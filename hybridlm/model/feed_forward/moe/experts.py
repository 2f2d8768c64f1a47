"""The routed experts of a mixture: their weights, on this process or spread over several.

N tokens, D model width, E experts, A experts per token, I expert width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from hybridlm.model.feed_forward.contract import Dispatch, ExpertStack
from hybridlm.model.feed_forward.moe.config import MoEConfig
from hybridlm.model.parameter_roles import ParameterRole, matrix_role
from hybridlm_kernels import moe_experts


class Experts(ExpertStack):
    """Weights of the routed experts: gate_up [E, 2I, D] (gate rows first) and down [E, D, I].

    After `keep_only`, E counts the experts of `owned`, and `dispatch` takes tokens to the processes of their experts.
    """

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__()
        experts = config.num_experts
        width = config.moe_intermediate_size
        self.limit, self.soft_caps = config.swiglu_limit, config.soft_caps()
        self.num_experts = experts
        self.widths = {"gate_up": (2 * width, hidden_size), "down": (hidden_size, width)}
        self.owned = range(experts)
        self.dispatch: Dispatch | None = None
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """The weighted sum of each token's experts, [N, D].

        Args:
            x_ND: tokens.
            ids_NA: int64 ids of each token's experts.
            weights_NA: their weights.
        """
        device = x_ND.device.type
        dtype = x_ND.dtype
        if torch.is_autocast_enabled(device):  # a fused operation does not take part in autocast
            dtype = torch.get_autocast_dtype(device)
        compute = self._compute if self.dispatch is None else partial(self.dispatch, self._compute)
        return compute(x_ND.to(dtype), ids_NA, weights_NA)

    def _compute(self, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """Outputs [N, D] of the experts that are here; `ids_NA` count from the first of these."""
        return moe_experts(x_ND, self.gate_up.to(x_ND.dtype), self.down.to(x_ND.dtype), ids_NA, weights_NA,
                           limit=self.limit, soft_caps=self.soft_caps)

    def keep_only(self, owned: range, dispatch: Dispatch) -> None:
        for name in ("gate_up", "down"):
            stack = getattr(self, name)
            kept = stack.detach()[owned.start:owned.stop].clone()
            setattr(self, name, nn.Parameter(kept, stack.requires_grad))
        self.owned = owned
        self.dispatch = dispatch

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return {name: matrix_role(rows, columns, "expert_stack") for name, (rows, columns) in self.widths.items()}

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw all experts and keep the owned ones, so that an expert's values do not depend on who owns it."""
        for weight in (self.gate_up, self.down):
            if len(weight) == self.num_experts:
                nn.init.normal_(weight, std=std)
                continue
            all_experts = weight.new_empty(self.num_experts, *weight.shape[1:])
            nn.init.normal_(all_experts, std=std)
            weight.copy_(all_experts[self.owned.start:self.owned.stop])
