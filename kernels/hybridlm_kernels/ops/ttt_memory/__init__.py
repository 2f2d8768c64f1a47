"""Test-time training: a memory whose weights take a gradient step on every mini-batch of tokens (TTT-Linear, TTT-MLP).

Legend: B rows, T tokens per row, H heads, K head dim, F hidden dim of the memory, M tokens of a mini-batch,
N documents, P weights of the memory of one head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, autocast

from hybridlm_kernels.compiling.operation import compilable
from hybridlm_kernels.ops.ttt_memory import reference, torch_backend
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.arguments import (
    Borders,
    borders_of,
    check_per_token,
    math_dtype,
    without_empty_documents,
)
from hybridlm_kernels.registry import Backend, Call, Operation, choose, register

OPERATION = register(Operation("ttt_memory", (
    Backend("torch", torch_backend.ttt_memory),
    Backend("reference", reference.ttt_memory),
)))


def memory_size(head_dim: int, hidden_dim: int = 0) -> int:
    """Number P of weights of the memory of one head.

    >>> memory_size(head_dim=2), memory_size(head_dim=2, hidden_dim=3)
    (6, 17)
    """
    if hidden_dim == 0:
        return head_dim * head_dim + head_dim
    return 2 * head_dim * hidden_dim + hidden_dim + head_dim


def _outputs(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, rate_BTH: Tensor, scale_M: Tensor, weights_HP: Tensor,
             norm_weight_HK: Tensor, norm_bias_HK: Tensor, *, cu_seqlens: CuSeqlens | None = None,
             **_: Any) -> tuple[Tensor, Tensor]:
    N = v_BTHK.shape[0] if cu_seqlens is None else cu_seqlens.num_documents
    return v_BTHK.new_empty(v_BTHK.shape), v_BTHK.new_empty((N, 2, *weights_HP.shape), dtype=math_dtype(v_BTHK))


@compilable(_outputs)
def ttt_memory(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, rate_BTH: Tensor, scale_M: Tensor,
                       weights_HP: Tensor, norm_weight_HK: Tensor, norm_bias_HK: Tensor, *, hidden_dim: int = 0,
                       eps: float = 1e-6, initial_state: Tensor | None = None, open_tokens: int = 0,
                       cu_seqlens: Borders = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Train a memory f by gradient descent on the tokens, in mini-batches of M, and read it with the queries.

        loss_s(W) = 1/2 |LN(f(k_s; W)) - (v_s - k_s)|^2
        W_j = W - scale_j sum_{s<=j} rate_s grad loss_s(W),     W: the weights at the start of the mini-batch
        o_j = q_j + LN(f(q_j; W_j))

    The next mini-batch starts from W_j of the last token. LN is a layer norm over the head.

    Args:
        q_BTHK: queries.
        k_BTHK: keys.
        v_BTHK: values, of the dims of the keys.
        rate_BTH: learning rate of each token, at least 0.
        scale_M: factor of each place j in a mini-batch; 1 / (j + 1) makes W_j the step on a mean gradient.
        weights_HP: weights of the memory at the start of every document: W1 [K, K] and b1 [K] of f(x) = x W1 + b1, or
            W1 [K, F], b1 [F], W2 [F, K] and b2 [K] of f(x) = gelu(x W1 + b1) W2 + b2, flattened, in this order; gelu
            in its tanh form.
        norm_weight_HK: weight of LN.
        norm_bias_HK: bias of LN.
        hidden_dim: F of a memory with a hidden layer; 0 is the linear one.
        eps: added to the variance in LN.
        initial_state: state of every document [N, 2, H, P], of an earlier call: the weights at the start of the open
            mini-batch and the sum of its gradients times their rates, which is read where `open_tokens` is not 0. None
            starts from `weights_HP`.
        open_tokens: tokens of the open mini-batch that the initial state has seen, fewer than M; not with borders.
        cu_seqlens: cumulative lengths of packed documents over the flattened B T tokens, with the start of every row
            among them. N is the number of documents, or B without borders. Each document has mini-batches of its own.
        backend: name of one backend, in place of the registry's choice.

    Returns:
        o [B, T, H, K] in v's dtype, and the state after the last token of every document, [N, 2, H, P] in float32
        (float64 for float64 values).

    Raises:
        ValueError: the shapes do not fit one another, or the borders do not cover the tokens.
        KernelUnavailable: no backend can run the call, or the named one cannot.

    Source: Sun et al. 2024, Learning to (Learn at Test Time), sections 2.3 to 2.6.

    >>> import torch
    >>> x, rate = torch.randn(1, 20, 2, 4), torch.full((1, 20, 2), 0.1)
    >>> o, state = ttt_memory(x, x, x, rate, 1 / torch.arange(1, 17), torch.zeros(2, memory_size(4)),
    ...                               torch.ones(2, 4), torch.zeros(2, 4))
    >>> o.shape, state.shape
    (torch.Size([1, 20, 2, 4]), torch.Size([1, 2, 2, 20]))
    """
    name = "ttt_memory"
    if v_BTHK.dim() != 4 or 0 in v_BTHK.shape:
        raise ValueError(f"{name}: v must be [batch, time, heads, dim], none of them 0; got {list(v_BTHK.shape)}")
    B, T, H, K = v_BTHK.shape
    M, P = len(scale_M), memory_size(K, hidden_dim)
    for label, x, shape in (("q", q_BTHK, (B, T, H, K)), ("k", k_BTHK, (B, T, H, K)), ("rate", rate_BTH, (B, T, H)),
                            ("weights", weights_HP, (H, P)), ("norm_weight", norm_weight_HK, (H, K)),
                            ("norm_bias", norm_bias_HK, (H, K)), ("scale", scale_M, (M,))):
        check_per_token(name, label, x, {"like v": shape})
    borders = borders_of(cu_seqlens, B, T, v_BTHK.device)
    N = B if borders is None else borders.num_documents
    if initial_state is not None and initial_state.shape != (N, 2, H, P):
        raise ValueError(f"{name}: initial_state must be {[N, 2, H, P]}; got {list(initial_state.shape)}")
    if not 0 <= open_tokens < M or (open_tokens and (borders is not None or initial_state is None)):
        raise ValueError(f"{name}: open_tokens must be below the {M} tokens of a mini-batch, and 0 with borders or "
                         f"without an initial state; got {open_tokens}")
    call = Call.of(v_BTHK, q_BTHK, k_BTHK, rate_BTH, scale_M, weights_HP, norm_weight_HK, norm_bias_HK, initial_state,
                   key_dim=K, value_dim=K, packed=borders is not None)
    dtype = math_dtype(v_BTHK)
    if initial_state is None:
        start_2HP = weights_HP.to(dtype)[None] * weights_HP.new_tensor([1.0, 0.0]).to(dtype)[:, None, None]
        initial_state = start_2HP.expand(N, 2, H, P)
    with autocast(v_BTHK.device.type, enabled=False):
        run = choose(OPERATION, call, backend).run
        wide = [x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHK, rate_BTH, scale_M, norm_weight_HK, norm_bias_HK)]
        o_BTHK, state = without_empty_documents(
            lambda state, filled: run(*wide, state.to(dtype), filled, hidden_dim, eps, open_tokens),  # type: ignore[union-attr]
            initial_state, borders)
    return o_BTHK.to(v_BTHK.dtype), state
