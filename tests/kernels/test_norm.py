"""Norms: the fused backwards against the equations."""

import pytest
import torch

from hybridlm_kernels import gated_rms_norm, l2_norm, rms_norm
from tests.support.kernel_compare import assert_same_function, error, tensors

SHAPES = [(1, 5), (3, 5, 7, 60), (2, 15, 64), (65, 100)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm(shape, zero_centered, dtype):
    x, w = tensors(shape, shape[-1:], dtype=dtype)
    assert_same_function(
        lambda backend: rms_norm(x, w, 1e-6, zero_centered=zero_centered, backend=backend), (x, w),
        TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm(shape, activation, dtype):
    x, gate, w = tensors(shape, shape, shape[-1:], dtype=dtype)
    assert_same_function(
        lambda backend: gated_rms_norm(x, gate, w, 1e-5, activation=activation, backend=backend), (x, gate, w),
        TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_l2_norm(shape, dtype):
    (x,) = tensors(shape, dtype=dtype)
    assert_same_function(lambda backend: l2_norm(x, backend=backend), (x,), TOLERANCE[dtype])


def test_values_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(rms_norm(x, torch.tensor([1.0, 2.0]), 0.0), torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    assert torch.allclose(rms_norm(x, torch.tensor([0.0, 1.0]), 0.0, zero_centered=True),
                          torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    assert torch.allclose(l2_norm(x, 0.0), torch.tensor([[0.6, 0.8]]))
    assert torch.allclose(gated_rms_norm(x, torch.zeros(1, 2), torch.ones(2), 0.0, activation="sigmoid"),
                          x / 12.5**0.5 / 2)


def test_strided_input():
    (x, w) = tensors((4, 6, 20), (20,))
    assert_same_function(lambda backend: rms_norm(x.transpose(0, 1), w, 1e-6, backend=backend), (x, w), 1e-13)


def test_zero_rows_stay_finite():
    x = torch.zeros(2, 8, requires_grad=True)
    for y in (l2_norm(x), rms_norm(x, torch.ones(8), 1e-6)):
        assert torch.equal(y, torch.zeros(2, 8))
        assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_backward_inside_autocast_keeps_fp32():
    x, w = tensors((64, 32), (32,), dtype=torch.float32)
    expected = torch.autograd.grad(rms_norm(x, w, 1e-6).square().sum(), (x, w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(rms_norm(x, w, 1e-6).square().sum(), (x, w))
    assert max(error(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-6


def test_bad_arguments():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="differ"):
        gated_rms_norm(x, torch.zeros(2, 7), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="'tanh'"):
        gated_rms_norm(x, x, torch.ones(8), 1e-6, activation="tanh")
