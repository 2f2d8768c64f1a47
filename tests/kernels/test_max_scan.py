"""The scan of falling maxima: equal to its definition, packed or not, with states, causal to the last bit."""

import pytest
import torch

from hybridlm_kernels import max_scan


def make(B=2, T=75, C=3, N=None):
    generator = torch.Generator().manual_seed(T)
    x, g, state = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in
                   ((B, T, C), (B, T, C), (N or B, C)))
    g = -g.abs()
    g[:, T // 2] = -torch.inf
    x[:, T // 3, 0] = -torch.inf
    return 3.0 * x, g, state


@pytest.mark.parametrize("borders", [None, [0, 1, 3, 40, 40, 75, 150]])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_definition(borders, with_state):
    x, g, state = make(N=None if borders is None else 6)
    options = {"initial_state": state if with_state else None, "cu_seqlens": borders}
    for got, wanted in zip(max_scan(x, g, backend="torch", **options),
                           max_scan(x, g, backend="reference", **options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_definition_is_the_largest_logarithm_of_all_terms():
    x, g, _ = make(B=1, T=9)
    m, _ = max_scan(x, g, backend="reference")
    for t in range(9):
        terms = [x[0, s] + g[0, s + 1 : t + 1].sum(0) for s in range(t + 1)]
        torch.testing.assert_close(m[0, t], torch.stack(terms).amax(0))


def test_causal_to_the_last_bit_and_no_gradient():
    x, g, _ = make()
    x = x.float().requires_grad_()
    before, _ = max_scan(x, g.float())
    assert not before.requires_grad
    for t in (0, 31, 40, 70):
        changed = x.detach().clone()
        changed[:, t + 1 :] += 9.0
        after, _ = max_scan(changed, g.float())
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_decoding_equals_one_call():
    x, g, state = make()
    one_call, last = max_scan(x, g, initial_state=state)
    found = []
    for t in range(x.shape[1]):
        m, state = max_scan(x[:, t : t + 1], g[:, t : t + 1], initial_state=state)
        found.append(m)
    torch.testing.assert_close(torch.cat(found, 1), one_call)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("x", (2, 75), r"x must be \[batch, time, channels\]"),
    ("g", (2, 75, 4), r"g must have the shape of x, \[2, 75, 3\]; got \[2, 75, 4\]"),
    ("state", (2, 4), r"initial_state must be \[documents, channels\] = \[2, 3\]; got \[2, 4\]"),
])
def test_shapes_that_do_not_fit(name, shape, message):
    inputs = dict(zip(("x", "g", "state"), make(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        max_scan(inputs["x"], inputs["g"], initial_state=inputs["state"])
