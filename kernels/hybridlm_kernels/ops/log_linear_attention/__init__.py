"""Log-linear attention: one state per level of a Fenwick tree over the tokens so far, each read with its own scale.

Legend: B rows, T tokens per row, H query/key heads, HV value heads, K/V key/value head dim, L levels, N documents.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.log_linear_attention import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_decay,
    check_per_token,
    check_shapes,
    math_dtype,
    without_empty_documents,
)
from hybridlm_kernels.recurrence.gates import Gate, log_decay, parameters_of
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("log_linear_attention", (
    Backend("torch", torch_backend.log_linear_attention),
    Backend("reference", reference.log_linear_attention),
)))


def _outputs(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, lambda_BTHvL: Tensor, *,
             cu_seqlens: CuSeqlens | None = None, final_state: bool = True, **_: Any) -> tuple[Tensor, Tensor]:
    N = v_BTHvV.shape[0] if cu_seqlens is None else cu_seqlens.num_documents
    levels = lambda_BTHvL.shape[3] - 1 if final_state else 0
    shape = (N, levels, v_BTHvV.shape[2], k_BTHK.shape[3], v_BTHvV.shape[3])
    return v_BTHvV.new_empty(v_BTHvV.shape), v_BTHvV.new_empty(shape, dtype=math_dtype(v_BTHvV))


@compilable(_outputs)
def log_linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, lambda_BTHvL: Tensor, *,
                         g: Tensor | None = None, gate: Gate | None = None, beta: Tensor | None = None,
                         scale: float | None = None, initial_state: Tensor | None = None, tokens_seen: int = 0,
                         final_state: bool = True, cu_seqlens: Borders = None,
                         backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Linear attention or the delta rule, whose past is cut into blocks that are read with scales of their own.

        o_t = scale * sum_l lambda_t^l (S_t^l)^T q_t

    S_t^0 is the write of token t alone. For l >= 1, S_t^l holds the writes of the block of 2^(l-1) tokens that ends
    where the token's own aligned block of 2^(l-1) starts, if bit l - 1 of its position t in the document is set. The
    last level L - 1 holds everything before the token's own block of 2^(L-2). All of them decay and are erased by later
    tokens as the one state of `linear_attention`, or with beta of `delta_rule`, would be; with all scales 1 the outputs
    are those of that operation.

    Args:
        q_BTHK: queries, activated; for the delta rule normalized.
        k_BTHK: keys, like the queries. Key head j serves value heads j r ... j r + r - 1, r = HV / H.
        v_BTHvV: values; HV is a multiple of H.
        lambda_BTHvL: scale of each level, any number; two levels or more. Documents of up to 2^(L-1) tokens have a
            level for every block.
        g: decay, None, [B, T, HV] or [B, T, HV, K]; without `gate` a natural logarithm of at most 0, with it raw.
        gate: the gate that turns the raw g into the logarithm of the decay.
        beta: write strength of the delta rule, activated, [B, T, HV]; None is linear attention.
        scale: factor on the queries, K ** -0.5 by default.
        initial_state: states of levels 1 .. L - 1 after `tokens_seen` tokens, [B, L - 1, HV, K, V], of an earlier call;
            not with borders.
        tokens_seen: tokens of every row that the initial state has seen, above 0 with it and 0 without.
        final_state: whether the states after the last token are wanted; without them less is computed.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, HV, V] in v's dtype, and the states of levels 1 .. L - 1 after the last token of every document, as the
        next token reads them, [N, L - 1, HV, K, V] in float32 (float64 for float64 values); [N, 0, HV, K, V] without
        `final_state`.

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Guo et al. 2025, Log-Linear Attention, sections 3.1 to 3.3.

    >>> import torch
    >>> ones = torch.ones(1, 8, 1, 1)
    >>> scales = torch.tensor([0.0, 1.0, 10.0, 100.0]).expand(1, 8, 1, 4)
    >>> log_linear_attention(ones, ones, ones, scales)[0].flatten().int().tolist()  # tokens in each block, as digits
    [0, 1, 20, 21, 400, 401, 420, 421]
    """
    name = "log_linear_attention"
    B, T, _, K = k_BTHK.shape if k_BTHK.dim() == 4 else (0, 0, 0, 0)
    borders = borders_of(cu_seqlens, B, T, q_BTHK.device)
    check_shapes(name, q_BTHK, k_BTHK, v_BTHvV, None, borders)
    HV, V = v_BTHvV.shape[2:]
    L = lambda_BTHvL.shape[-1]
    check_per_token(name, "lambda", lambda_BTHvL, {"a scale per level": (B, T, HV, max(L, 2))})
    decay = check_decay(name, g, gate, {"scalar": (B, T, HV), "channel": (B, T, HV, K)})
    if beta is not None:
        check_per_token(name, "beta", beta, {"scalar": (B, T, HV)})
    if initial_state is not None and (borders is not None or initial_state.shape != (B, L - 1, HV, K, V)):
        raise ValueError(f"{name}: initial_state must be {[B, L - 1, HV, K, V]}, without borders; "
                         f"got {list(initial_state.shape)}")
    if (tokens_seen > 0) != (initial_state is not None):
        raise ValueError(f"{name}: tokens_seen must be above 0 with an initial state and 0 without; got {tokens_seen}")
    call = Call.of(v_BTHvV, q_BTHK, k_BTHK, lambda_BTHvL, g, beta, initial_state, *parameters_of(gate), decay=decay,
                   key_dim=K, value_dim=V, packed=borders is not None)
    with autocast(q_BTHK.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        g = log_decay(g, gate)
        scale = K**-0.5 if scale is None else scale
        return without_empty_documents(
            lambda state, filled: run(q_BTHK, k_BTHK, v_BTHvV, lambda_BTHvL, g, beta, scale, state, filled, tokens_seen,
                                      final_state), initial_state, borders)
