"""Linear attention with decay on flash-linear-attention's kernels, for comparison and for who has it installed.

Legend: B rows, T tokens, H query/key heads, G value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence import fla_call
from hybridlm_kernels.recurrence.gates import Gate, log_decay
from hybridlm_kernels.registry import Call

SIMPLE, CHANNEL = ("fla.ops.simple_gla", "chunk_simple_gla"), ("fla.ops.gla", "chunk_gla")


def supports(call: Call) -> tuple[bool, str]:
    """Where the package has the kernel, and it takes such tensors."""
    return fla_call.accepts(call, CHANNEL if call.get("decay") == "channel" else SIMPLE)


def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, g: Tensor | None, scale: float,
                    state_NGKV: Tensor | None, borders: CuSeqlens | None,
                    gate: Gate | None = None) -> tuple[Tensor, Tensor]:
    """Arguments as in the public function, already checked."""
    g = log_decay(g, gate)
    tokens = fla_call.equal_heads({"q": q_BTHK, "k": k_BTHK, "v": v_BTGV})
    if g is not None and g.dim() == 1:
        return fla_call.call(SIMPLE, tokens, scale, state_NGKV, borders, g_gamma=g)
    return fla_call.call(CHANNEL if g is not None and g.dim() == 4 else SIMPLE, tokens | {"g": g}, scale, state_NGKV,
                    borders)
