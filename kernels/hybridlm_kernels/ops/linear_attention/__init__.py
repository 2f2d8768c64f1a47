"""Linear attention with decay: RetNet and Lightning (constant), Mamba-2 (scalar), GLA (decay per channel).

Legend: B rows, T tokens a row, H query/key heads, G value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from torch import Tensor, autocast, float16

from hybridlm_kernels.ops.linear_attention import fla_backend, reference, torch_backend
from hybridlm_kernels.recurrence.arguments import Borders, borders_of, check_decay, check_shapes, fits_triton
from hybridlm_kernels.recurrence.gates import Gate, parameters_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend


def _fits(call: Call) -> tuple[bool, str]:
    if call.dtype == float16:
        return False, "multiplies states in the dtype of the values, and they overflow float16; use bfloat16"
    return fits_triton(call)


OPERATION = register(Operation("linear_attention", (
    lazy_triton_backend("hybridlm_kernels.ops.linear_attention.triton_backend", "linear_attention", _fits),
    Backend("torch", torch_backend.linear_attention),
    Backend("fla", fla_backend.linear_attention, fla_backend.supports, ("cuda",)),
    Backend("reference", reference.linear_attention),
)))


def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, *, g: Tensor | None = None,
                    gate: Gate | None = None, scale: float | None = None,
                    initial_state: Tensor | None = None, cu_seqlens: Borders = None,
                    backend: str | None = None) -> tuple[Tensor, Tensor]:
    """S_t = Diag(e^g_t) S_{t-1} + k_t v_t^T;  o_t = scale * S_t^T q_t.

    Args:
        q_BTHK, k_BTHK: queries and keys. Key head j serves value heads j*r .. j*r+r-1, r = G / H.
        v_BTGV: values; G is a multiple of H.
        g: natural logarithm of the decay, at most 0 (-inf forgets everything): None (no decay), [G] (one
            constant a head), [B, T, G] (one a head and token) or [B, T, G, K] (one a channel).
        gate: makes the logarithm of the decay from g, [B, T, G] or [B, T, G, K], which is then the raw output
            of a projection.
        scale: factor on the queries, K ** -0.5 by default.
        initial_state: [N, G, K, V]; None is zero.
        cu_seqlens: borders of packed documents over the flattened B*T tokens, row starts included. N is the
            number of documents, or B without borders. State never crosses a border.
        backend: name one backend instead of the registry's choice.

    Returns:
        o [B, T, G, V] in v's dtype, and the state after the last token of every document [N, G, K, V] in
        float32 (float64 for float64 values). Half precision inputs are computed in float32.

    Raises:
        ValueError: shapes that do not fit. KernelUnavailable: no backend can run it.

    Sources: Sun et al. 2023 (RetNet), Yang et al. 2023 (GLA), MiniMax-01 2025 (Lightning attention).
    """
    B, T, _, K = k_BTHK.shape if k_BTHK.dim() == 4 else (0, 0, 0, 0)
    borders = borders_of(cu_seqlens, B, T, q_BTHK.device)
    check_shapes("linear_attention", q_BTHK, k_BTHK, v_BTGV, initial_state, borders)
    G = v_BTGV.shape[2]
    decay = check_decay("linear_attention", g, gate,
                        {"constant": (G,), "scalar": (B, T, G), "channel": (B, T, G, K)})
    call = Call.of(v_BTGV, q_BTHK, k_BTHK, g, initial_state, *parameters_of(gate), decay=decay,
                   key_dim=K, value_dim=v_BTGV.shape[3], packed=borders is not None)
    with autocast(q_BTHK.device.type, enabled=False):
        return choose(OPERATION, call, backend).run(
            q_BTHK, k_BTHK, v_BTGV, g, K**-0.5 if scale is None else scale, initial_state, borders, gate)
