"""The delta rule on flash-linear-attention's kernels, where that package is installed.

Legend: B rows, T tokens, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence import fla_call
from hybridlm_kernels.recurrence.gates import Gate, log_decay, write_strength
from hybridlm_kernels.registry import Call

ENTRY = {"none": ("fla.ops.delta_rule", "chunk_delta_rule"),
         "scalar": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
         "channel": ("fla.ops.kda", "chunk_kda")}


def supports(call: Call) -> tuple[bool, str]:
    """Whether the package is installed and its kernel accepts the call, and if not, the reason."""
    if call.get("erase", "plain") != "plain":
        return False, f"erases at the write key, read after the decay; got {call.get('erase')}"
    return fla_call.accepts(call, ENTRY[call.get("decay")])


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, beta_BTHv: Tensor | None,
               scale: float, state_NHvKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
               gate: Gate | None = None, beta_sigmoid: float | None = None, final_state: bool = True
               ) -> tuple[Tensor, Tensor]:
    """The flash-linear-attention backend; arguments as in the public function, already checked."""
    g, beta_BTHv = log_decay(g, gate), write_strength(beta_BTHv, beta_sigmoid)
    if beta_BTHv is None:
        beta_BTHv = v_BTHvV.new_ones(v_BTHvV.shape[:3])
    tokens = {"q": q_BTHK, "k": k_BTHK, "v": v_BTHvV, "g": g, "beta": beta_BTHv}
    if g is None:
        decay = "none"
        tokens = fla_call.equal_heads(tokens)
    else:
        decay = "scalar" if g.dim() == 3 else "channel"
    return fla_call.call(ENTRY[decay], tokens, scale, state_NHvKV, borders, final_state,
                         use_qk_l2norm_in_kernel=qk_l2norm)
