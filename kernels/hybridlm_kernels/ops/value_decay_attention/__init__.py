"""Linear attention whose state decays along the axis of the values: the first pass of slot attention (GSA, ABC).

Legend: B rows, T tokens per row, H heads, K/V key/value head dim, N documents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.value_decay_attention import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_per_token,
    check_shapes,
    empty_states,
    without_empty_documents,
)
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("value_decay_attention", (
    Backend("torch", torch_backend.value_decay_attention),
    Backend("reference", reference.value_decay_attention),
)))


def _outputs(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHV: Tensor, *, cu_seqlens: CuSeqlens | None = None,
             **_: Any) -> tuple[Tensor, Tensor]:
    return v_BTHV.new_empty(v_BTHV.shape), empty_states(k_BTHK, v_BTHV, cu_seqlens)


@compilable(_outputs)
def value_decay_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHV: Tensor, *,
                          scale: float | None = None, initial_state: Tensor | None = None,
                          cu_seqlens: Borders = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Linear attention with a decay per value channel: each column of the state S [K, V] decays by itself.

        S_t = S_{t-1} Diag(e^{g_t}) + k_t v_t^T
        o_t = scale * S_t^T q_t

    With the write weights of M slots as values, column m of S is the key that slot m holds, and o_t scores the slots.

    Args:
        q_BTHK: queries, activated.
        k_BTHK: keys, activated.
        v_BTHV: values, for slots their write weights.
        g_BTHV: natural logarithm of the decay, at most 0; -inf forgets the column.
        scale: factor on the queries, K ** -0.5 by default.
        initial_state: state before the first token of every document, [N, H, K, V]; None is zero.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. No state crosses a border, and the
            state after an empty document is its initial state.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token of every document, [N, H, K, V] in float32
        (float64 for float64 values). Half precision inputs are computed in float32.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Zhang et al. 2024, Gated Slot Attention, section 3.2.

    >>> import torch
    >>> ones = torch.ones(1, 3, 1, 1)
    >>> values, decay = torch.ones(1, 3, 1, 2), torch.tensor([0.5, 1.0]).log().expand(1, 3, 1, 2)
    >>> o, state = value_decay_attention(ones, ones, values, decay)  # the first column halves before every token
    >>> o[0, :, 0].tolist(), state.flatten().tolist()
    ([[1.0, 1.0], [1.5, 2.0], [1.75, 3.0]], [1.75, 3.0])
    """
    B, T, _, K = k_BTHK.shape if k_BTHK.dim() == 4 else (0, 0, 0, 0)
    borders = borders_of(cu_seqlens, B, T, q_BTHK.device)
    if v_BTHV.dim() == k_BTHK.dim() == 4 and v_BTHV.shape[2] != k_BTHK.shape[2]:
        raise ValueError(f"value_decay_attention: v must have the {k_BTHK.shape[2]} heads of q and k; "
                         f"got {v_BTHV.shape[2]}")
    check_shapes("value_decay_attention", q_BTHK, k_BTHK, v_BTHV, initial_state, borders)
    check_per_token("value_decay_attention", "g", g_BTHV, {"per value channel": tuple(v_BTHV.shape)})
    call = Call.of(v_BTHV, q_BTHK, k_BTHK, g_BTHV, initial_state, key_dim=K, value_dim=v_BTHV.shape[3],
                   packed=borders is not None)
    with autocast(q_BTHK.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        return without_empty_documents(
            lambda state, filled: run(q_BTHK, k_BTHK, v_BTHV, g_BTHV, K**-0.5 if scale is None else scale, state,
                                      filled), initial_state, borders)
