"""Index keys of pools: a weighted mean of the keys of a pool's tokens, the weights learned for each channel.

    k_p = sum_r softmax_r(W_g x_(p,r) + b_r) * k_(p,r)          r over the tokens of pool p

Source: GLM-5.3.
B rows, T tokens, P pools, R tokens per pool, D hidden size, I index head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm_kernels import Pools


class KeyPool(nn.Module):
    """Weighted mean over the index keys of each pool. Parameters: gate.weight [I, D], bias [R, I]."""

    def __init__(self, size: int, hidden_size: int, dim: int):
        super().__init__()
        self.size = size
        self.gate = nn.Linear(hidden_size, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(size, dim))

    def parameter_roles(self) -> dict[str, ParameterRole]:
        return find_roles(self, {"bias": VECTOR})

    def entries(self, x_BTD: Tensor, k_BTI: Tensor) -> Tensor:
        """Compute the key and the logit of the weight of each token for its pool: [B, T, 2, I]."""
        return torch.stack([k_BTI, self.gate(x_BTD).to(k_BTI.dtype)], 2)

    def forward(self, entries_BPR2I: Tensor, place_BP: Tensor | None = None) -> Tensor:
        """Combine the entries [B, P, R, 2, I] of complete pools into their keys [B, P, I], wherever these begin."""
        k_BPRI, gate_BPRI = entries_BPR2I.unbind(3)
        wide = torch.promote_types(k_BPRI.dtype, torch.float32)
        weight_BPRI = torch.softmax(gate_BPRI.to(wide) + self.bias.to(wide), 2)
        return (weight_BPRI * k_BPRI.to(wide)).sum(2).to(k_BPRI.dtype)

    def gather(self, entries_BT2I: Tensor, pools: Pools) -> Tensor:
        """Put the entries [B, T, 2, I] of the tokens of a batch together by pools: [B, P, R, 2, I]."""
        member_BE = pools.members().flatten(1)
        row_BE = torch.arange(member_BE.shape[0], device=member_BE.device)[:, None]
        return entries_BT2I[row_BE, member_BE].unflatten(1, (pools.number, self.size))
