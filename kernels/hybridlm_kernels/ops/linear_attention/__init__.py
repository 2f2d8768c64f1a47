"""Linear attention with decay: RetNet and Lightning (constant), Mamba-2 (scalar), GLA (per channel).

Legend: B rows, T tokens per row, H query/key heads, HV value heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast, float16

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.linear_attention import fla_backend, reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence import fla_call
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_decay,
    check_shapes,
    empty_states,
    fits_triton,
    without_empty_documents,
)
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
    Backend("fla", fla_backend.linear_attention, fla_backend.supports, ("cuda",), fla_call.replacements),
    Backend("reference", reference.linear_attention),
)))


def _outputs(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, *, cu_seqlens: CuSeqlens | None = None,
             final_state: bool = True, **_: Any) -> tuple[Tensor, Tensor]:
    return v_BTHvV.new_empty(v_BTHvV.shape), empty_states(k_BTHK, v_BTHvV, cu_seqlens, final_state)


@compilable(_outputs)
def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, *, g: Tensor | None = None,
                    gate: Gate | None = None, scale: float | None = None,
                    initial_state: Tensor | None = None, cu_seqlens: Borders = None,
                    final_state: bool = True, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Linear attention with decay: a state S [K, V] per value head is decayed, k v^T is added to it, and q reads it.

        S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Args:
        q_BTHK: queries, activated (after the feature map or activation).
        k_BTHK: keys, activated like the queries. Key head j serves value heads j r ... j r + r - 1, r = HV / H.
        v_BTHvV: values, activated; HV is a multiple of H.
        g: decay, None (no decay), [HV] (constant: one per head), [B, T, HV] (scalar: one per head and token) or
            [B, T, HV, K] (one per channel and token). Without `gate` it is activated: a natural logarithm, at most 0,
            and -inf forgets everything. With `gate` it is raw: the output of a projection, [B, T, HV] or [B, T, HV, K].
        gate: the gate that turns the raw g into the logarithm of the decay.
        scale: factor on the queries, K ** -0.5 by default.
        initial_state: state before the first token of every document, [N, HV, K, V]; None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No state crosses a border, and the
            state after an empty document is its initial state.
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

    Sources: Sun et al. 2023, RetNet, eq. 6; Yang et al. 2023, Gated Linear Attention, eq. 3; MiniMax-01, 2025
    (Lightning attention).

    >>> import torch
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> half = torch.tensor([0.5]).log()
    >>> o, state = linear_attention(ones, ones, ones, g=half)  # the state halves before every token
    >>> o.flatten(), state.flatten()
    (tensor([1.0000, 1.5000, 1.7500]), tensor([1.7500]))
    """
    B, T, _, K = k_BTHK.shape if k_BTHK.dim() == 4 else (0, 0, 0, 0)
    borders = borders_of(cu_seqlens, B, T, q_BTHK.device)
    check_shapes("linear_attention", q_BTHK, k_BTHK, v_BTHvV, initial_state, borders)
    HV = v_BTHvV.shape[2]
    decay = check_decay("linear_attention", g, gate,
                        {"constant": (HV,), "scalar": (B, T, HV), "channel": (B, T, HV, K)})
    call = Call.of(v_BTHvV, q_BTHK, k_BTHK, g, initial_state, *parameters_of(gate), decay=decay,
                   key_dim=K, value_dim=v_BTHvV.shape[3], packed=borders is not None)
    with autocast(q_BTHK.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(
            lambda state, filled: run(q_BTHK, k_BTHK, v_BTHvV, g, K**-0.5 if scale is None else scale, state, filled,
                                      gate, final_state), initial_state, borders, final_state)
