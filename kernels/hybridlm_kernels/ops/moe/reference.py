"""Routed SwiGLU experts, one expert after the other.

N tokens, A experts per token, E experts, D model width, I expert width.
"""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels.ops.swiglu.reference import swiglu
from hybridlm_kernels.ops.swiglu.soft_caps import SoftCaps


def moe_experts(x_ND: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, expert_ids_NA: Tensor,
                weights_NA: Tensor, limit: float | None = None,
                soft_caps: SoftCaps | None = None) -> Tensor:
    """y_n = sum_a weights_na * down_e(swiglu(gate_e x_n, up_e x_n)), with e = expert_ids_na."""
    y_ND = x_ND.new_zeros(x_ND.shape)
    for expert in range(gate_up_E2ID.shape[0]):
        token, slot = (expert_ids_NA == expert).nonzero(as_tuple=True)
        gate_MI, up_MI = (x_ND[token] @ gate_up_E2ID[expert].T).chunk(2, -1)
        out_MD = swiglu(gate_MI, up_MI, limit, soft_caps) @ down_EDI[expert].T
        y_ND = y_ND.index_add(0, token, out_MD * weights_NA[token, slot, None].to(out_MD.dtype))
    return y_ND
