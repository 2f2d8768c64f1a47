"""Output projection through a narrow width per group of heads: y = W_b [A_1 o_1 | ... | A_P o_P].

Source: DeepSeek-V4, 2026, section 2.3.1 (grouped output projection).
B rows, T tokens, D hidden size, P groups, X dims of a group's heads together, R rank of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.parameter_roles import ParameterRole, find_roles


class GroupedOutput(nn.Module):
    """The module. Parameters: down [P, R, X], and up_proj [D, P R].

    Args:
        heads_width: dims of all heads together, P X.
        groups: groups of heads P.
        rank: dims of each group after its projection R.
        hidden_size: width of the result D.
    """

    def __init__(self, heads_width: int, groups: int, rank: int, hidden_size: int):
        super().__init__()
        self.groups = groups
        self.down = nn.Parameter(torch.zeros(groups, rank, heads_width // groups))
        self.up_proj = nn.Linear(groups * rank, hidden_size, bias=False)

    def forward(self, o_BTHV: Tensor) -> Tensor:
        o_BTPX = o_BTHV.flatten(2).unflatten(2, (self.groups, -1))
        return self.up_proj(torch.einsum("btpx,prx->btpr", o_BTPX, self.down.to(o_BTPX.dtype)).flatten(2))

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"down": ParameterRole("expert_stack")})

    def init_weights(self, std: float) -> None:
        """Both from normal(0, std)."""
        nn.init.normal_(self.down, std=std)
        nn.init.normal_(self.up_proj.weight, std=std)
