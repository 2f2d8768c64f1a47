"""Linear attention with decay on flash-linear-attention's kernels, where that package is installed.

Legend: B rows, T tokens, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence import fla_call
from hybridlm_kernels.recurrence.gates import Gate, log_decay
from hybridlm_kernels.registry import Call

ENTRY_SCALAR = ("fla.ops.simple_gla", "chunk_simple_gla")
ENTRY_CHANNEL = ("fla.ops.gla", "chunk_gla")


def supports(call: Call) -> tuple[bool, str]:
    """Whether the package is installed and its kernel accepts the call, and if not, the reason."""
    return fla_call.accepts(call, ENTRY_CHANNEL if call.get("decay") == "channel" else ENTRY_SCALAR)


def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, scale: float,
                    state_NHvKV: Tensor | None, borders: CuSeqlens | None,
                    gate: Gate | None = None, final_state: bool = True) -> tuple[Tensor, Tensor]:
    """The flash-linear-attention backend; arguments as in the public function, already checked."""
    g = log_decay(g, gate)
    tokens = fla_call.equal_heads({"q": q_BTHK, "k": k_BTHK, "v": v_BTHvV})
    if g is not None and g.dim() == 1:
        return fla_call.call(ENTRY_SCALAR, tokens, scale, state_NHvKV, borders, final_state, g_gamma=g)
    entry = ENTRY_CHANNEL if g is not None and g.dim() == 4 else ENTRY_SCALAR
    return fla_call.call(entry, tokens | {"g": g}, scale, state_NHvKV, borders, final_state)
