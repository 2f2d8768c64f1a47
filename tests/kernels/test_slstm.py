"""sLSTM: every backend equal to the definition, packed or not, with states, causal to the last bit."""

import pytest
import torch

from hybridlm_kernels import slstm


def make(B=2, T=13, H=2, K=3, N=None):
    generator = torch.Generator().manual_seed(0)
    x, R, state = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in
                   ((B, T, H, 4, K), (H, 4, K, K), (N or B, H, 4, K)))
    state[:, :, 2] = 1.0 + state[:, :, 2].abs()
    return 2.0 * x, R, state


def results_and_gradients(x, R, state, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, R)]
    h, final = slstm(*leaves, initial_state=state, **options)
    upstream = torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=h.dtype)
    return [h, final, *torch.autograd.grad(h, leaves, upstream)]


@pytest.mark.parametrize("borders", [None, [0, 1, 3, 3, 13, 20, 26]])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_definition(borders, with_state):
    x, R, state = make(N=None if borders is None else 6)
    inputs = (x, R, state if with_state else None)
    expected = results_and_gradients(*inputs, cu_seqlens=borders, backend="reference")
    for got, wanted in zip(results_and_gradients(*inputs, cu_seqlens=borders, backend="torch"), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_the_definition_is_the_recurrence_without_a_maximum():
    x, R, _ = make(B=1, T=7, H=1)
    h = c = n = torch.zeros(3, dtype=torch.float64)
    for t in range(7):
        z, i, f, o = (x[0, t, 0, gate] + R[0, gate] @ h for gate in range(4))
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        torch.testing.assert_close(slstm(x, R, backend="reference")[0][0, t, 0], h)


def test_gradcheck():
    x, R, _ = make(B=1, T=5, H=1, K=2)
    assert torch.autograd.gradcheck(lambda x, R: slstm(x, R, cu_seqlens=[0, 2, 5])[0],
                                    [x.requires_grad_(), R.requires_grad_()])


def test_causal_to_the_last_bit_and_decoding_equals_one_call():
    x, R, state = make()
    before, last = slstm(x.float(), R.float(), initial_state=state.float())
    for t in (0, 6, 11):
        changed = x.float()
        changed[:, t + 1 :] += 1.0
        assert torch.equal(before[:, : t + 1], slstm(changed, R.float(), initial_state=state.float())[0][:, : t + 1])
    outputs, state = [], state.float()
    for t in range(x.shape[1]):
        h, state = slstm(x[:, t : t + 1].float(), R.float(), initial_state=state)
        outputs.append(h)
    torch.testing.assert_close(torch.cat(outputs, 1), before)
    torch.testing.assert_close(state, last)


def test_large_gates_stay_finite():
    x, R, _ = make()
    found = results_and_gradients(300.0 * x.float(), R.float(), None)
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("x", (2, 13, 2, 3, 3), r"x must be \[batch, time, heads, 4, dim\]"),
    ("R", (2, 4, 3, 2), r"R must be \[heads, 4, dim, dim\] = \[2, 4, 3, 3\]; got \[2, 4, 3, 2\]"),
    ("state", (2, 2, 3, 3), r"initial_state must be \[documents, heads, 4, dim\] = \[2, 2, 4, 3\]"),
])
def test_shapes_that_do_not_fit(name, shape, message):
    inputs = dict(zip(("x", "R", "state"), make(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        slstm(inputs["x"], inputs["R"], initial_state=inputs["state"])
