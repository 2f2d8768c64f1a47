"""The delta rule on flash-linear-attention's kernels, for comparison and for who has it installed.

Legend: B rows, T tokens, H query/key heads, G value heads, K/V key/value head dim, N documents.
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
    """Where the package has the kernel, and it takes such tensors."""
    return fla_call.accepts(call, ENTRY[call.get("decay")])


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, g: Tensor | None, beta_BTG: Tensor | None,
               scale: float, state_NGKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
               gate: Gate | None = None, beta_sigmoid: float | None = None) -> tuple[Tensor, Tensor]:
    """Arguments as in the public function, already checked."""
    g, beta_BTG = log_decay(g, gate), write_strength(beta_BTG, beta_sigmoid)
    if beta_BTG is None:
        beta_BTG = v_BTGV.new_ones(v_BTGV.shape[:3])
    tokens = {"q": q_BTHK, "k": k_BTHK, "v": v_BTGV, "g": g, "beta": beta_BTG}
    decay = "none" if g is None else "scalar" if g.dim() == 3 else "channel"
    return fla_call.call(ENTRY[decay], fla_call.equal_heads(tokens) if decay == "none" else tokens, scale, state_NGKV, borders,
                    use_qk_l2norm_in_kernel=qk_l2norm)
