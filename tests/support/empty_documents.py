"""Borders with documents that hold no token: no operation may notice them, but for the states it returns for them."""

import torch

import hybridlm_kernels as ops
from hybridlm_kernels.random_inputs import recurrence_inputs

ROWS, LENGTH = 2, 70
BORDERS = [0, 3, 70, 71, 140]
# Empty documents at the start of the table, at a row's start, inside a row, and as padding of the table at its end.
WITH_EMPTY = [0, 0, 3, 70, 70, 71, 71, 71, 140, 140, 140]
FILLED, EMPTY = [1, 2, 4, 7], [0, 3, 5, 6, 8, 9]


def _index():
    generator = torch.Generator().manual_seed(0)
    per_token = ((4, 16), (16,), (4,), (4, 32), (2, 32))  # index queries, keys and weights; main queries and keys
    return [torch.randn((ROWS, LENGTH, *shape), generator=generator) for shape in per_token]


def _pools(borders):
    return ops.Pools.of(ROWS, LENGTH, LENGTH, 8, torch.device("cpu"), borders)


def _pool_keys(k_BSI, borders):
    return k_BSI[:, : _pools(borders).number]


# Every operation that takes borders and keeps no state: `call(q, k, w, main_q, main_k, borders, backend) -> output`.
STATELESS = {
    "attention": lambda q, k, w, main_q, main_k, borders, backend: ops.attention(
        main_q, main_k, main_k, cu_seqlens=borders, backend=backend),
    "attention_window": lambda q, k, w, main_q, main_k, borders, backend: ops.attention(
        main_q, main_k, main_k, window=5, cu_seqlens=borders, backend=backend),
    "indexer_topk": lambda q, k, w, main_q, main_k, borders, backend: ops.indexer_topk(
        q, k, w, 6, cu_seqlens=borders, backend=backend),
    "indexer_kl": lambda q, k, w, main_q, main_k, borders, backend: ops.indexer_kl(
        q, k, w, main_q, main_k, cu_seqlens=borders, backend=backend).loss,
    "attention_recall": lambda q, k, w, main_q, main_k, borders, backend: ops.attention_recall(
        main_q, main_k, ops.indexer_topk(q, k, w, 6, cu_seqlens=BORDERS), cu_seqlens=borders, backend=backend).mass,
    "pooled_topk": lambda q, k, w, main_q, main_k, borders, backend: ops.pooled_topk(
        q, _pool_keys(k, borders), w, _pools(borders), 2, backend=backend),
    "pooled_indexer_kl": lambda q, k, w, main_q, main_k, borders, backend: ops.pooled_indexer_kl(
        q, _pool_keys(k, borders), w, main_q, main_k, _pools(borders), cu_seqlens=borders, backend=backend).loss,
}
RECURRENT = ("delta_rule", "linear_attention", "short_conv")


def assert_empty_documents_are_invisible(name, backend, device="cpu"):
    """The output with empty documents among the borders is, to the bit, the one without them."""
    inputs = [x.to(device) for x in _index()]
    expected = STATELESS[name](*inputs, BORDERS, backend)
    assert torch.equal(STATELESS[name](*inputs, WITH_EMPTY, backend), expected)


def _recurrent_call(name, state_N, borders, backend, device):
    """Output and last states in fp32 from these initial states, and the gradient of the initial states."""
    inputs = recurrence_inputs("scalar", B=ROWS, T=LENGTH, beta=name == "delta_rule", documents=0)
    inputs = {key: x.float().to(device) for key, x in inputs.items()}
    state_N = state_N.to(device).requires_grad_()
    if name == "short_conv":
        weight = torch.linspace(-1, 1, 64, device=device).view(16, 4)
        o, last = ops.short_conv(inputs["v"][:, :, 0], weight, initial_state=state_N[:, 0, :, :3].contiguous(),
                                 cu_seqlens=borders, backend=backend)
    else:
        q, k, v = (inputs.pop(key) for key in "qkv")
        o, last = getattr(ops, name)(q, k, v, **inputs, initial_state=state_N, cu_seqlens=borders, backend=backend)
    gradient = torch.autograd.grad(o.sum() + last.square().sum(), state_N)[0]
    return o.detach(), last.detach(), gradient


def assert_empty_documents_keep_their_states(name, backend, device="cpu"):
    """Filled documents are computed as without empty ones, to the bit; an empty one passes its state on."""
    state_N = torch.randn(len(WITH_EMPTY) - 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = _recurrent_call(name, state_N[FILLED], BORDERS, backend, device)
    o, last, gradient = _recurrent_call(name, state_N, WITH_EMPTY, backend, device)
    assert torch.equal(o, expected[0])
    assert torch.equal(last[FILLED], expected[1])
    assert torch.equal(gradient[FILLED], expected[2])
    passed_on = state_N[EMPTY][:, 0, :, :3] if name == "short_conv" else state_N[EMPTY]
    assert torch.equal(last[EMPTY].cpu(), passed_on)
    assert torch.equal(gradient[EMPTY][..., :3].cpu(), 2 * state_N[EMPTY][..., :3])
