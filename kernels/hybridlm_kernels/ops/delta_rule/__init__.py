"""The (gated) delta rule: DeltaNet, Gated DeltaNet (scalar decay) and KDA (decay per channel).

Legend: B rows, T tokens per row, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.delta_rule import fla_backend, reference, torch_backend
from hybridlm_kernels.ops.delta_rule.steps import spread_over_steps
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence import fla_call
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_decay,
    check_per_token,
    check_shapes,
    empty_states,
    fits_triton,
    without_empty_documents,
)
from hybridlm_kernels.recurrence.erase import Erase, form_of
from hybridlm_kernels.recurrence.gates import Gate, parameters_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register
from hybridlm_kernels.triton_support import lazy_triton_backend

OPERATION = register(Operation("delta_rule", (
    lazy_triton_backend("hybridlm_kernels.ops.delta_rule.triton_backend", "delta_rule", fits_triton),
    Backend("torch", spread_over_steps(torch_backend.delta_rule)),
    Backend("fla", spread_over_steps(fla_backend.delta_rule), fla_backend.supports, ("cuda",), fla_call.replacements),
    Backend("reference", spread_over_steps(reference.delta_rule)),
)))


def _outputs(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, *, cu_seqlens: CuSeqlens | None = None,
             steps: int = 1, final_state: bool = True, **_: Any) -> tuple[Tensor, Tensor]:
    B, rows, HV, V = v_BTHvV.shape
    return v_BTHvV.new_empty(B, rows // steps, HV, V), empty_states(k_BTHK, v_BTHvV, cu_seqlens, final_state)


@compilable(_outputs)
def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, *, g: Tensor | None = None,
               beta: Tensor | None = None, gate: Gate | None = None, beta_sigmoid: float | None = None,
               scale: float | None = None, initial_state: Tensor | None = None, cu_seqlens: Borders = None,
               qk_l2norm: bool = False, erase_key: Tensor | None = None, erase_vector: Tensor | None = None,
               erase_before_decay: bool = False, steps: int = 1, final_state: bool = True,
               backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The gated delta rule: a state [K, V] per value head decays, is corrected towards v at the key k, and q reads it.

        S_t = Diag(e^{g_t}) S_{t-1}
        S_t = S_t + beta_t k_t (v_t - S_t^T k_t)^T
        o_t = scale * S_t^T q_t

    An erase key p of its own, an erase vector b, and a read R = S_{t-1} before the decay in place of
    R = Diag(e^{g_t}) S_{t-1} after it make the general rule

        S_t = Diag(e^{g_t}) S_{t-1} + beta_t k_t (v_t - R^T p_t)^T          with p (Comba, Gated DeltaNet 2)
        S_t = Diag(e^{g_t}) S_{t-1} + b_t (R^T p_t)^T + k_t v_t^T           with p and b (RWKV-7)

    Args:
        q_BTHK: queries, activated (after convolution and activation); not yet normalized if `qk_l2norm` is set.
        k_BTHK: keys, activated like the queries. Key head j serves value heads j r ... j r + r - 1, r = HV / H.
        v_BTHvV: values, activated; HV is a multiple of H.
        g: decay, None (no decay), [B, T, HV] (scalar: one per head) or [B, T, HV, K] (one per channel). Without `gate`
            it is activated: a natural logarithm, at most 0, and -inf forgets everything. With `gate` it is raw: the
            output of a projection.
        beta: write strength [B, T, HV], None for 1. Without `beta_sigmoid` it is activated, with it raw.
        gate: the gate that turns the raw g into the logarithm of the decay.
        beta_sigmoid: a factor c; the write strength is then c * sigmoid(beta).
        scale: factor on the queries, K ** -0.5 by default.
        initial_state: state before the first token of every document, [N, HV, K, V]; None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No state crosses a border, and the
            state after an empty document is its initial state.
        qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6) first.
        erase_key: p, [B, T, H, K] or [B, T, HV, K], used as it is whatever `qk_l2norm` says; None is k.
        erase_vector: b, in the same shapes, used as it is; None is -beta k. It leaves no place for beta.
        erase_before_decay: whether the state is read at p before it decays.
        steps: writes per token, n (DeltaProduct). k, v, beta, erase_key and erase_vector then have n rows per token,
            [B, T n, ...]; q and g stay [B, T, ...]. The state decays before the first row, q reads it after the last.
        final_state: whether the final states are wanted. Without them less memory is written and read, which counts
            where documents are short.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, HV, V] in v's dtype, and the state after the last token of every document, [N, HV, K, V] in float32
        (float64 for float64 values), or [0, HV, K, V] without `final_state`. The torch backend computes half precision
        inputs in float32; the Triton backend multiplies in their dtype and sums in float32.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Sources: Yang et al. 2024, Gated Delta Networks, eq. 10; Kimi Linear, 2025, eq. 1 (KDA, decay per channel);
    Hu et al. 2025, Comba, eq. 7 (read before the decay); Peng et al. 2025, RWKV-7, eq. 17 (free erase vector);
    Siems et al. 2025, DeltaProduct, eq. 5 (several steps per token).

    >>> import torch
    >>> q = k = torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2)
    >>> v = torch.arange(3.0).view(1, 3, 1, 1)
    >>> o, state = delta_rule(q, k, v, scale=1.0)  # every write replaces the value at the key
    >>> o.flatten(), state.flatten()
    (tensor([0., 1., 2.]), tensor([2., 0.]))
    """
    if steps < 1 or (steps > 1 and q_BTHK.dim() != 4):
        raise ValueError(f"delta_rule: steps must be 1 or more, and q [batch, time, heads, dim]; got steps={steps}, "
                         f"q {list(q_BTHK.shape)}")
    B, T, _, K = k_BTHK.shape if k_BTHK.dim() == 4 else (0, 0, 0, 0)
    rows_of_q = q_BTHK  # one per row of k
    if steps > 1:
        B, tokens, *head = q_BTHK.shape
        rows_of_q = q_BTHK.new_empty((B, tokens * steps, *head), device="meta")
        borders = borders_of(cu_seqlens, B, tokens, q_BTHK.device)
        borders = None if borders is None else borders.in_rows(steps)
    else:
        borders = borders_of(cu_seqlens, B, T, q_BTHK.device)
    check_shapes("delta_rule", rows_of_q, k_BTHK, v_BTHvV, initial_state, borders)
    tokens, HV = q_BTHK.shape[1], v_BTHvV.shape[2]
    decay = check_decay("delta_rule", g, gate, {"scalar": (B, tokens, HV), "channel": (B, tokens, HV, K)})
    if beta is not None:
        check_per_token("delta_rule", "beta", beta, {"scalar": (B, T, HV)})
    erase = Erase.of("delta_rule", erase_key, erase_vector, erase_before_decay, beta, k_BTHK, HV)
    call = Call.of(v_BTHvV, q_BTHK, k_BTHK, g, beta, initial_state, erase_key, erase_vector, *parameters_of(gate),
                   decay=decay, key_dim=K, value_dim=v_BTHvV.shape[3], packed=borders is not None, erase=form_of(erase))
    with autocast(q_BTHK.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(
            lambda state, filled: run(q_BTHK, k_BTHK, v_BTHvV, g, beta, K**-0.5 if scale is None else scale, state,
                                      filled, qk_l2norm, gate, beta_sigmoid, final_state, erase, steps), initial_state,
            borders, final_state)
