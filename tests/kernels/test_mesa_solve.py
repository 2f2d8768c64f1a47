"""Mesa solve: conjugate gradients equal the direct solver, gradients too, packed or not, and causal to the last bit."""

import pytest
import torch
from torch.nn.functional import normalize

from hybridlm_kernels import mesa_solve


def make(B=2, T=40, H=2, K=5, N=None):
    """q, k, beta, g, lambda and symmetric states, in fp64."""
    generator = torch.Generator().manual_seed(T)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    root = randn(N or B, H, K, K)
    return [randn(B, T, H, K), normalize(randn(B, T, H, K), dim=-1), randn(B, T, H).sigmoid(), -randn(B, T, H).square(),
            0.3 + randn(H, K).square(), root @ root.mT]


def results_and_gradients(inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    x, final = mesa_solve(*leaves[:5], initial_state=leaves[5] if len(leaves) > 5 else None, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in (x, final)]
    grads = list(torch.autograd.grad([x, final], leaves, upstream))
    if len(leaves) > 5:
        grads[5] = grads[5] + grads[5].mT  # states are symmetric, and so is what they can change by
    return [x, final, *grads]


@pytest.mark.parametrize("borders", [None, [0, 1, 3, 40, 40, 50, 80]])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_direct_solver(borders, with_state):
    inputs = make(N=None if borders is None else 6)[: 6 if with_state else 5]
    expected = results_and_gradients(inputs, cu_seqlens=borders, backend="reference")
    for got, wanted in zip(results_and_gradients(inputs, cu_seqlens=borders, backend="torch"), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_causal_to_the_last_bit():
    inputs = [x.float() for x in make()[:5]]
    before, _ = mesa_solve(*inputs)
    for t in (0, 17, 38):
        changed = [x.clone() for x in inputs]
        for x in changed[:3]:
            x[:, t + 1 :] *= 0.5
        after, _ = mesa_solve(*changed)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_a_solved_system_stays_solved():
    """Many more iterations than dims, queries of zero among them: no division by nothing."""
    inputs = [x.float() for x in make(K=2)[:5]]
    inputs[0][:, ::3] = 0.0
    few, many = (mesa_solve(*inputs, iterations=n)[0] for n in (4, 200))
    assert many.isfinite().all()
    assert not many[:, ::3].any()
    torch.testing.assert_close(few, many)


@pytest.mark.parametrize(("place", "shape", "message"), [
    (2, (2, 40, 3), "beta must have shape"), (4, (5,), "lambda must have shape"),
    (5, (2, 2, 5, 4), "initial_state must be"),
])
def test_shapes_that_do_not_fit(place, shape, message):
    inputs = make()
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        mesa_solve(*inputs[:5], initial_state=inputs[5])
