"""The memory of Titans: chunks equal the definition, gradients too, for every packing and cut of a row."""

import pytest
import torch

from hybridlm_kernels import delta_rule, titans_memory

CHUNK = 4


def make(B=2, T=22, H=2, K=3, hidden_dim=0, N=None):
    """Inputs in fp64, and a state of an open chunk."""
    generator = torch.Generator().manual_seed(T + hidden_dim)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    P = 2 * K * hidden_dim if hidden_dim else K * K
    gates = [randn(B, T, H).sigmoid() for _ in range(3)]
    gates[2] = 0.2 * gates[2]
    return [randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H, K), *gates, 0.5 * randn(H, P)], 0.5 * randn(
        N or B, 3, H, P)


def results_and_gradients(inputs, state, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    state = None if state is None else state.clone().requires_grad_()
    o, final = titans_memory(*leaves, initial_state=state, chunk=CHUNK, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (o, final)]
    learnt = leaves if state is None else [*leaves[:6], state]  # with a state the first weights are not used
    return [o, final, *torch.autograd.grad([o, final], learnt, upstream)]


@pytest.mark.parametrize("hidden_dim", [0, 5])
@pytest.mark.parametrize(("length", "borders", "open_tokens"), [
    (22, None, 0), (24, None, 0), (3, None, 0), (22, [0, 1, 3, 22, 22, 30, 44], 0), (22, None, 3), (1, None, 2),
    (5, None, 3)])
def test_equals_the_definition(hidden_dim, length, borders, open_tokens):
    inputs, state = make(T=length, hidden_dim=hidden_dim, N=None if borders is None else 6)
    for start in (state,) if open_tokens else (state, None):
        options = {"hidden_dim": hidden_dim, "cu_seqlens": borders, "open_tokens": open_tokens}
        expected = results_and_gradients(inputs, start, backend="reference", **options)
        for got, wanted in zip(results_and_gradients(inputs, start, backend="torch", **options), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_matrix_by_the_formula_of_its_gradient(backend):
    """Token by token, with 2 k (k M - v)^T written out."""
    inputs, _ = make(B=1, H=1)
    q, k, v, alpha, eta, theta = (x[0, :, 0] for x in inputs[:6])
    M = W = inputs[6].view(3, 3)
    S, expected = torch.zeros_like(M), []
    for t in range(22):
        W = M if t % CHUNK == 0 else W
        S = eta[t] * S - 2 * theta[t] * torch.outer(k[t], k[t] @ W - v[t])
        M = (1 - alpha[t]) * M + S
        expected.append(q[t] @ M)
    o, _ = titans_memory(*inputs, chunk=CHUNK, backend=backend)
    torch.testing.assert_close(o[0, :, 0], torch.stack(expected), rtol=1e-10, atol=1e-11)


def test_one_token_per_chunk_without_momentum_is_the_delta_rule():
    inputs, _ = make()
    q, k, v, alpha, eta, theta, weights = inputs
    inputs[4] = torch.zeros_like(eta)
    o, _ = titans_memory(*inputs[:3], torch.zeros_like(alpha), *inputs[4:6], torch.zeros_like(weights), chunk=1)
    torch.testing.assert_close(o, delta_rule(q, k, v, beta=2 * theta, scale=1.0)[0], rtol=1e-10, atol=1e-11)


def test_causal_to_the_last_bit():
    inputs, _ = make(hidden_dim=5)
    inputs = [x.float() for x in inputs]
    before, _ = titans_memory(*inputs, hidden_dim=5, chunk=CHUNK)
    for t in (0, 5, 19):
        changed = [x.clone() for x in inputs]
        for x in changed[:6]:
            x[:, t + 1 :] *= 0.5
        after, _ = titans_memory(*changed, hidden_dim=5, chunk=CHUNK)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_decoding_equals_one_call():
    inputs, _ = make()
    one_call, last = titans_memory(*inputs, chunk=CHUNK)
    outputs, state, seen = [], None, 0
    for length in (2, 1, 1, 9, 1, 7, 1):
        part = [x[:, seen : seen + length] for x in inputs[:6]]
        o, state = titans_memory(*part, inputs[6], chunk=CHUNK, initial_state=state, open_tokens=seen % CHUNK)
        outputs.append(o)
        seen += length
    torch.testing.assert_close(torch.cat(outputs, 1), one_call)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(("place", "shape", "message"), [
    (1, (2, 22, 2, 4), r"k must have shape \[2, 22, 2, 3\]"), (4, (2, 22), "eta must have shape"),
    (6, (2, 11), r"weights must have shape \[2, 9\]"), (7, (2, 2, 2, 9), r"initial_state must be \[2, 3, 2, 9\]"),
])
def test_shapes_that_do_not_fit(place, shape, message):
    inputs, state = make()
    inputs = [*inputs, state]
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        titans_memory(*inputs[:7], initial_state=inputs[7])


def test_open_tokens_need_their_state():
    inputs, _ = make()
    with pytest.raises(ValueError, match="open_tokens must be below the 4 tokens of a chunk"):
        titans_memory(*inputs, chunk=CHUNK, open_tokens=2)
