"""Linear attention with a decay per value channel: equal to its definition, packed or not, and causal."""

import pytest
import torch

from hybridlm_kernels import linear_attention, value_decay_attention


def make(B=2, T=75, H=2, K=5, V=7, N=None, strength=3.0):
    """q, k, v, g with one decay of -inf, and states."""
    generator = torch.Generator().manual_seed(T)
    q, k, v, state = (torch.randn(shape, generator=generator, dtype=torch.float64)
                      for shape in ((B, T, H, K), (B, T, H, K), (B, T, H, V), (N or B, H, K, V)))
    g = -strength * torch.rand(B, T, H, V, generator=generator, dtype=torch.float64)
    g[:, T // 2] = -torch.inf
    return [q, k, v, g, state]


def results_and_gradients(q, k, v, g, state, **options):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (q, k, v, g, state)]
    o, final = value_decay_attention(*leaves[:4], initial_state=leaves[4], **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (o, final)]
    return [o, final, *torch.autograd.grad([o, final], [t for t in leaves if t is not None], upstream)]


@pytest.mark.parametrize("borders", [None, [0, 1, 3, 40, 40, 75, 150]])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_definition(borders, with_state):
    *tensors, state = make(N=None if borders is None else 6)
    inputs = (*tensors, state if with_state else None)
    expected = results_and_gradients(*inputs, cu_seqlens=borders, backend="reference")
    for got, wanted in zip(results_and_gradients(*inputs, cu_seqlens=borders, backend="torch"), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_each_value_channel_is_linear_attention_with_a_scalar_decay():
    q, k, v, g, _ = make(T=70, strength=1.0)
    o, state = value_decay_attention(q, k, v, g)
    for m in range(v.shape[3]):
        alone, end = linear_attention(q, k, v[..., m : m + 1], g=g[..., m])
        torch.testing.assert_close(o[..., m : m + 1], alone, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(state[..., m : m + 1], end, rtol=1e-11, atol=1e-11)


def test_causal_to_the_last_bit():
    tensors = [t.float() for t in make()[:4]]
    before, _ = value_decay_attention(*tensors)
    for t in (0, 31, 40, 70):
        changed = [x.clone() for x in tensors]
        for x in changed[:3]:
            x[:, t + 1 :] += 1.0
        changed[3][:, t + 1 :] -= 0.5
        after, _ = value_decay_attention(*changed)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_decoding_equals_one_call():
    *tensors, state = make(T=40)
    one_call, last = value_decay_attention(*tensors, initial_state=state)
    outputs = []
    for t in range(40):
        o, state = value_decay_attention(*[x[:, t : t + 1] for x in tensors], initial_state=state)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), one_call)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("v", (2, 75, 4, 7), "v must have the 2 heads of q and k; got 4"),
    ("g", (2, 75, 2, 5), r"g must have shape \[2, 75, 2, 7\] \(per value channel\); got \[2, 75, 2, 5\]"),
    ("state", (2, 2, 7, 5), "initial_state must be"),
])
def test_shapes_that_do_not_fit(name, shape, message):
    inputs = dict(zip(("q", "k", "v", "g", "state"), make(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        value_decay_attention(*[inputs[n] for n in "qkvg"], initial_state=inputs["state"])
