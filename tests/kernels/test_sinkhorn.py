"""Sinkhorn-Knopp: doubly stochastic results, and the gradient of the normalisations."""

import pytest
import torch

from hybridlm_kernels import sinkhorn


def positive(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp().requires_grad_()


def test_rows_and_columns_sum_to_one():
    x = sinkhorn(positive(3, 5, 4, 4), 60, 0.0)
    for dim in (-1, -2):
        torch.testing.assert_close(x.sum(dim), torch.ones(3, 5, 4, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 4])
def test_equals_the_reference_with_its_gradient(iterations):
    x = positive(3, 5, 4, 4)
    results = [sinkhorn(x, iterations, 1e-3, backend=backend) for backend in ("torch", "reference")]
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(y[..., 1, 2].square().sum() + y[..., 0].sum(), x)[0]
                                 for y in results), rtol=1e-9, atol=1e-12)


def test_computes_in_fp32_under_autocast():
    x = positive(2, 4, 4).detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = sinkhorn(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, sinkhorn(x.float()))


@pytest.mark.parametrize(("shape", "iterations", "message"), [
    ((3, 4), 20, r"must be square, \[\.\.\., M, M\]; got \[3, 4\]"), ((4, 4), 0, "iterations must be positive; got 0")])
def test_bad_arguments(shape, iterations, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.ones(shape), iterations)
