"""Test-time training: mini-batches equal the definition, gradients too, for every packing and cut of a row."""

import pytest
import torch

from hybridlm_kernels import ttt_memory
from hybridlm_kernels.ops.ttt_memory import memory_size

M = 4


def make(B=2, T=22, H=2, K=3, hidden_dim=0, N=None):
    """Inputs in fp64, and a state with gradients of an open mini-batch."""
    generator = torch.Generator().manual_seed(T + hidden_dim)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    P = memory_size(K, hidden_dim)
    scale = 1.0 / torch.arange(1, M + 1) + 0.1 * randn(M)
    return [randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H).sigmoid(), scale, 0.5 * randn(H, P),
            1.0 + 0.2 * randn(H, K), 0.2 * randn(H, K)], 0.5 * randn(N or B, 2, H, P)


def results_and_gradients(inputs, state, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    state = None if state is None else state.clone().requires_grad_()
    o, final = ttt_memory(*leaves, initial_state=state, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (o, final)]
    # With an initial state the weights of the start are not used.
    learnt = leaves if state is None else [*leaves[:5], *leaves[6:], state]
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


def test_causal_to_the_last_bit():
    inputs, _ = make(hidden_dim=5)
    inputs = [x.float() for x in inputs]
    before, _ = ttt_memory(*inputs, hidden_dim=5)
    for t in (0, 5, 19):
        changed = [x.clone() for x in inputs]
        for x in changed[:4]:
            x[:, t + 1 :] += 0.5
        after, _ = ttt_memory(*changed, hidden_dim=5)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_decoding_equals_one_call():
    inputs, _ = make()
    one_call, last = ttt_memory(*inputs)
    outputs, state, seen = [], None, 0
    for length in (2, 1, 1, 9, 1, 7, 1):
        part = [x[:, seen : seen + length] for x in inputs[:4]]
        o, state = ttt_memory(*part, *inputs[4:], initial_state=state, open_tokens=seen % M)
        outputs.append(o)
        seen += length
    torch.testing.assert_close(torch.cat(outputs, 1), one_call)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(("place", "shape", "message"), [
    (1, (2, 22, 2, 4), r"k must have shape \[2, 22, 2, 3\]"),
    (5, (2, 11), r"weights must have shape \[2, 12\]"),
    (8, (2, 1, 2, 12), r"initial_state must be \[2, 2, 2, 12\]"),
])
def test_shapes_that_do_not_fit(place, shape, message):
    inputs, state = make()
    inputs = [*inputs, state]
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        ttt_memory(*inputs[:8], initial_state=inputs[8])


def test_open_tokens_need_their_state():
    inputs, _ = make()
    with pytest.raises(ValueError, match="open_tokens must be below the 4 tokens of a mini-batch"):
        ttt_memory(*inputs, open_tokens=2)
