"""The (gated) delta rule: DeltaNet, Gated DeltaNet (scalar decay) and KDA (decay per channel).

Legend: B rows, T tokens a row, H query/key heads, G value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from torch import Tensor, autocast

from hybridlm_kernels.ops.delta_rule import fla_backend, reference, torch_backend
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_decay,
    check_per_token,
    check_shapes,
    fits_triton,
)
from hybridlm_kernels.recurrence.gates import Gate, parameters_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

OPERATION = register(Operation("delta_rule", (
    lazy_triton_backend("hybridlm_kernels.ops.delta_rule.triton_backend", "delta_rule", fits_triton),
    Backend("torch", torch_backend.delta_rule),
    Backend("fla", fla_backend.delta_rule, fla_backend.supports, ("cuda",)),
    Backend("reference", reference.delta_rule),
)))


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, *, g: Tensor | None = None,
               beta: Tensor | None = None, gate: Gate | None = None, beta_sigmoid: float | None = None,
               scale: float | None = None, initial_state: Tensor | None = None, cu_seqlens: Borders = None,
               qk_l2norm: bool = False, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """S_t = Diag(e^g_t) S_{t-1};  S_t += beta_t k_t (v_t - S_t^T k_t)^T;  o_t = scale * S_t^T q_t.

    Args:
        q_BTHK, k_BTHK: queries and keys. Key head j serves value heads j*r .. j*r+r-1, r = G / H.
        v_BTGV: values; G is a multiple of H.
        g: natural logarithm of the decay, at most 0 (-inf forgets everything): None (no decay), [B, T, G]
            (one a head) or [B, T, G, K] (one a channel).
        beta: write strength [B, T, G]; None is 1.
        gate: makes the logarithm of the decay from g, which is then the raw output of a projection.
        beta_sigmoid: with a number, the write strength is that number times sigmoid(beta).
        scale: factor on the queries, K ** -0.5 by default.
        initial_state: [N, G, K, V]; None is zero.
        cu_seqlens: borders of packed documents over the flattened B*T tokens, row starts included. N is the
            number of documents, or B without borders. State never crosses a border.
        qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6) first.
        backend: name one backend instead of the registry's choice.

    Returns:
        o [B, T, G, V] in v's dtype, and the state after the last token of every document [N, G, K, V] in
        float32 (float64 for float64 values). Half precision inputs are computed in float32.

    Raises:
        ValueError: shapes that do not fit. KernelUnavailable: no backend can run it.

    Sources: Yang et al. 2024 (Gated Delta Networks), Kimi Linear 2025 (KDA).
    """
    B, T, _, K = k_BTHK.shape if k_BTHK.dim() == 4 else (0, 0, 0, 0)
    borders = borders_of(cu_seqlens, B, T, q_BTHK.device)
    check_shapes("delta_rule", q_BTHK, k_BTHK, v_BTGV, initial_state, borders)
    G = v_BTGV.shape[2]
    decay = check_decay("delta_rule", g, gate, {"scalar": (B, T, G), "channel": (B, T, G, K)})
    if beta is not None:
        check_per_token("delta_rule", "beta", beta, {"scalar": (B, T, G)})
    call = Call.of(v_BTGV, q_BTHK, k_BTHK, g, beta, initial_state, *parameters_of(gate), decay=decay, key_dim=K,
                   value_dim=v_BTGV.shape[3], packed=borders is not None)
    with autocast(q_BTHK.device.type, enabled=False):
        return choose(OPERATION, call, backend).run(
            q_BTHK, k_BTHK, v_BTGV, g, beta, K**-0.5 if scale is None else scale, initial_state, borders,
            qk_l2norm, gate, beta_sigmoid)
