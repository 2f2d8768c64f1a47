"""The neural memory of Titans: weights that learn from each token by gradient descent with momentum and decay.

Legend: B rows, T tokens per row, H heads, K head dim, F hidden dim of the memory, N documents, P weights of the memory
of one head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.titans_memory import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_per_token,
    math_dtype,
    without_empty_documents,
)
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("titans_memory", (
    Backend("torch", torch_backend.titans_memory),
    Backend("reference", reference.titans_memory),
)))


def _outputs(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, alpha_BTH: Tensor, eta_BTH: Tensor, theta_BTH: Tensor,
             weights_HP: Tensor, *, cu_seqlens: CuSeqlens | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    N = v_BTHK.shape[0] if cu_seqlens is None else cu_seqlens.num_documents
    return v_BTHK.new_empty(v_BTHK.shape), v_BTHK.new_empty((N, 3, *weights_HP.shape), dtype=math_dtype(v_BTHK))


@compilable(_outputs)
def titans_memory(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, alpha_BTH: Tensor, eta_BTH: Tensor,
                  theta_BTH: Tensor, weights_HP: Tensor, *, hidden_dim: int = 0, chunk: int = 16,
                  initial_state: Tensor | None = None, open_tokens: int = 0, cu_seqlens: Borders = None,
                  backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Train a memory f on the tokens by gradient descent with momentum and decay, and read it with the queries.

        S_t = eta_t S_{t-1} - theta_t grad |f(k_t; W) - v_t|^2
        M_t = (1 - alpha_t) M_{t-1} + S_t;    o_t = f(q_t; M_t)

    W are the weights M at the start of the token's chunk.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHK: values, of the dims of the keys.
        alpha_BTH: decay of the memory, 0 to 1.
        eta_BTH: decay of the momentum, 0 to 1.
        theta_BTH: learning rate, at least 0.
        weights_HP: weights of the memory at the start of every document: W1 [K, K] of f(x) = x W1, or W1 [K, F] and
            W2 [F, K] of f(x) = gelu(x W1) W2, flattened, in this order; gelu in its tanh form.
        hidden_dim: F of a memory with a hidden layer; 0 is the linear one.
        chunk: tokens whose gradients are taken at the same weights; 1 is the recurrence token by token.
        initial_state: state of every document [N, 3, H, P], of an earlier call: the weights at the start of the open
            chunk, those now, and the momentum. None starts from `weights_HP` without momentum.
        open_tokens: tokens of the open chunk that the initial state has seen, fewer than `chunk`; not with borders.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. Each document has chunks of its own.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, K] in v's dtype, and the state after the last token of every document, [N, 3, H, P] in float32
        (float64 for float64 values).

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Behrouz et al. 2025, Titans, sections 3.1 and 3.2.

    >>> import torch
    >>> ones, gate = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1)
    >>> o, state = titans_memory(ones, ones, ones, gate, gate, gate + 0.25, torch.zeros(1, 1), chunk=1)
    >>> o.flatten()  # without momentum and decay half of the error goes at every token
    tensor([0.5000, 0.7500, 0.8750])
    """
    name = "titans_memory"
    if v_BTHK.dim() != 4 or 0 in v_BTHK.shape:
        raise ValueError(f"{name}: v must be [batch, time, heads, dim], none of them 0; got {list(v_BTHK.shape)}")
    B, T, H, K = v_BTHK.shape
    P = K * K if hidden_dim == 0 else 2 * K * hidden_dim
    for label, x, shape in (("q", q_BTHK, (B, T, H, K)), ("k", k_BTHK, (B, T, H, K)), ("alpha", alpha_BTH, (B, T, H)),
                            ("eta", eta_BTH, (B, T, H)), ("theta", theta_BTH, (B, T, H)),
                            ("weights", weights_HP, (H, P))):
        check_per_token(name, label, x, {"like v": shape})
    borders = borders_of(cu_seqlens, B, T, v_BTHK.device)
    N = B if borders is None else borders.num_documents
    if initial_state is not None and initial_state.shape != (N, 3, H, P):
        raise ValueError(f"{name}: initial_state must be {[N, 3, H, P]}; got {list(initial_state.shape)}")
    if not 0 <= open_tokens < chunk or (open_tokens and (borders is not None or initial_state is None)):
        raise ValueError(f"{name}: open_tokens must be below the {chunk} tokens of a chunk, and 0 with borders or "
                         f"without an initial state; got {open_tokens}")
    call = Call.of(v_BTHK, q_BTHK, k_BTHK, alpha_BTH, eta_BTH, theta_BTH, weights_HP, initial_state, key_dim=K,
                   value_dim=K, packed=borders is not None)
    dtype = math_dtype(v_BTHK)
    if initial_state is None:
        start_3HP = weights_HP.to(dtype) * weights_HP.new_tensor([1.0, 1.0, 0.0]).to(dtype)[:, None, None]
        initial_state = start_3HP.expand(N, 3, H, P)
    with autocast(v_BTHK.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        wide = [x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHK, alpha_BTH, eta_BTH, theta_BTH)]
        o_BTHK, state = without_empty_documents(
            lambda state, filled: run(*wide, state.to(dtype), filled, hidden_dim, chunk, open_tokens),  # type: ignore[union-attr]
            initial_state, borders)
    return o_BTHK.to(v_BTHK.dtype), state
