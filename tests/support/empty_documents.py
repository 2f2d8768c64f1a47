"""Borders with documents that hold no token: no operation may notice them, but for the states it returns for them."""

import torch

import hybridlm_kernels as ops

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
    "forgetting_attention": lambda q, k, w, main_q, main_k, borders, backend: ops.forgetting_attention(
        main_q, main_k, main_k, -w.exp(), cu_seqlens=borders, backend=backend),
    "position_weighted_mean": lambda q, k, w, main_q, main_k, borders, backend: ops.position_weighted_mean(
        main_q[..., 0, :], main_q[..., 1, :], w[0], w[0].flip(0), window=3, cu_seqlens=borders, backend=backend),
    "suffix_match": lambda q, k, w, main_q, main_k, borders, backend: ops.suffix_match(
        main_q[..., 0, :], main_q[..., 1, :], main_q[..., 0, :], w[0, 0, 0].exp().expand(main_q.shape[-1]),
        cu_seqlens=borders, backend=backend)[0],
    "max_scan": lambda q, k, w, main_q, main_k, borders, backend: ops.max_scan(
        w, -w.exp(), cu_seqlens=borders, backend=backend)[0],
    "slstm": lambda q, k, w, main_q, main_k, borders, backend: ops.slstm(
        main_q.unflatten(-1, (4, 8)), torch.eye(8).to(main_q).expand(4, 4, 8, 8), cu_seqlens=borders,
        backend=backend)[0],
    "log_linear_attention": lambda q, k, w, main_q, main_k, borders, backend: ops.log_linear_attention(
        main_k, main_k, main_k, q[..., :2, :5], g=-w[..., :2].exp(), cu_seqlens=borders, backend=backend)[0],
    "attention_total": lambda q, k, w, main_q, main_k, borders, backend: ops.attention_total(
        main_q, main_k, main_k, window=5, cu_seqlens=borders, backend=backend)[0],
    "selected_attention": lambda q, k, w, main_q, main_k, borders, backend: ops.selected_attention(
        main_q, main_k, main_k, torch.arange(4).expand(ROWS, LENGTH, 1, 4), block=3, window=5, cu_seqlens=borders,
        backend=backend)[0],
    "path_attention": lambda q, k, w, main_q, main_k, borders, backend: ops.path_attention(
        main_q, main_k, main_k, ops.l2_norm(main_k), w[..., :2].sigmoid(), cu_seqlens=borders, backend=backend),
    "deltaformer_values": lambda q, k, w, main_q, main_k, borders, backend: ops.deltaformer_values(
        main_q, main_k, main_k, w.sigmoid(), cu_seqlens=borders, backend=backend),
    "simplicial_attention": lambda q, k, w, main_q, main_k, borders, backend: ops.simplicial_attention(
        main_q, main_k, main_k, main_k, main_k, window=5, second_window=3, cu_seqlens=borders, backend=backend),
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


def _recurrence(operation, x, state_N, **options):
    q, k, v = (x[..., :16].unflatten(-1, (1, 16)) for _ in range(3))
    return operation(q, k, v, g=-x[..., :1].square(), initial_state=state_N, **options)


def _selective(x, state_N, **options):
    rates_DN = -torch.linspace(0.1, 1, 32, device=x.device).view(16, 2)
    return ops.selective_scan(x[..., :16], x[..., :16].square(), rates_DN, x[..., :2], x[..., 2:4],
                              initial_state=state_N, **options)


def _mesa_solve(x, state_N, **options):
    q = k = x[..., None].mT
    lambda_HK = torch.full((1, 16), 40.0, device=x.device)  # above the eigenvalues of the states, which are any numbers
    return ops.mesa_solve(q, k, x[..., :1].square(), -x[..., :1].square(), lambda_HK, initial_state=state_N, **options)


def _diagonal_ssm(x, state_N, **options):
    """With one real mode per channel: real states come in and go out."""
    log_a_CS = torch.linspace(-2, -0.1, 16, device=x.device)[:, None] + 0j
    y, last = ops.diagonal_ssm(x[..., None], log_a_CS, torch.ones_like(log_a_CS),
                               initial_state=state_N[..., None] + 0j, **options)
    return y, last.real[..., 0]


def _ttt_memory(x, state_N, **options):
    q, k, v, rate = x[..., :4, None].mT, x[..., 4:8, None].mT, x[..., 8:12, None].mT, x[..., 12:13].square()
    ones = torch.ones(1, 4, device=x.device)
    return ops.ttt_memory(q, k, v, rate, torch.ones(16, device=x.device), torch.zeros(1, 20, device=x.device),
                                  ones, ones, initial_state=state_N, **options)


def _titans_memory(x, state_N, **options):
    q, k, v = x[..., :4, None].mT, 0.5 * x[..., 4:8, None].mT, x[..., 8:12, None].mT
    gates = [x[..., i : i + 1].sigmoid() for i in (12, 13, 14)]
    return ops.titans_memory(q, k, v, *gates, torch.zeros(1, 16, device=x.device), initial_state=state_N, **options)


# Every operation with a state per document: the shape of one state, and `call(x [B, T, 16], state_N, **options)`.
RECURRENT = {
    "delta_rule": ((1, 16, 16), lambda x, state_N, **options: _recurrence(ops.delta_rule, x, state_N, **options)),
    "linear_attention": ((1, 16, 16), lambda x, state_N, **options: _recurrence(
        ops.linear_attention, x, state_N, **options)),
    "short_conv": ((16, 3), lambda x, state_N, **options: ops.short_conv(
        x, torch.linspace(-1, 1, 64, device=x.device).view(16, 4), initial_state=state_N, **options)),
    "linear_scan": ((16,), lambda x, state_N, **options: ops.linear_scan(
        x, torch.sigmoid(x), initial_state=state_N, **options)),
    "selective_scan": ((16, 2), _selective),
    "diagonal_ssm": ((16, 1), _diagonal_ssm),
    "mesa_solve": ((1, 16, 16), _mesa_solve),
    "titans_memory": ((3, 1, 16), _titans_memory),
    "ttt_memory": ((2, 1, 20), _ttt_memory),
    "value_decay_attention": ((1, 16, 16), lambda x, state_N, **options: _recurrence(
        lambda q, k, v, g, **kw: ops.value_decay_attention(q, k, v, g[..., None].expand_as(v), **kw),
        x, state_N, **options)),
}


def assert_empty_documents_are_invisible(name, backend, device="cpu"):
    """The output with empty documents among the borders is, to the bit, the one without them."""
    inputs = [x.to(device) for x in _index()]
    expected = STATELESS[name](*inputs, BORDERS, backend)
    assert torch.equal(STATELESS[name](*inputs, WITH_EMPTY, backend), expected)


def _with_gradient(name, state_N, borders, backend, device):
    """Output and last states in fp32 from these initial states, and the gradient of the initial states."""
    x = torch.randn(ROWS, LENGTH, 16, generator=torch.Generator().manual_seed(1)).to(device) * 0.3
    state_N = state_N.to(device).requires_grad_()
    o, last = RECURRENT[name][1](x, state_N, cu_seqlens=borders, backend=backend)
    gradient = torch.autograd.grad(o.sum() + last.square().sum(), state_N)[0]
    return o.detach(), last.detach(), gradient


def assert_empty_documents_keep_their_states(name, backend, device="cpu"):
    """Filled documents are computed as without empty ones, to the bit; an empty one passes its state on."""
    shape = RECURRENT[name][0]
    state_N = torch.randn(len(WITH_EMPTY) - 1, *shape, generator=torch.Generator().manual_seed(0))
    expected = _with_gradient(name, state_N[FILLED], BORDERS, backend, device)
    o, last, gradient = _with_gradient(name, state_N, WITH_EMPTY, backend, device)
    assert torch.equal(o, expected[0])
    assert torch.equal(last[FILLED], expected[1])
    assert torch.equal(gradient[FILLED], expected[2])
    assert torch.equal(last[EMPTY].cpu(), state_N[EMPTY])
    assert torch.equal(gradient[EMPTY].cpu(), 2 * state_N[EMPTY])
