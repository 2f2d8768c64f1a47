"""Norms: outputs and every gradient against the fp64 reference."""

import pytest
import torch

from hybridlm_kernels import KernelUnavailable, gated_rms_norm, l2_norm, rms_norm
from tests.support.against_reference import assert_equals_reference
from tests.support.kernel_compare import tensors

SHAPES = [(1, 60), (63, 100), (2, 65, 1), (3, 7, 5, 64), (0, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm(shape, zero_centered, device):
    assert_equals_reference(
        lambda backend, x, w: rms_norm(x, w, 1e-6, zero_centered=zero_centered, backend=backend),
        tensors(shape, shape[-1:]), device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm(shape, activation, device):
    assert_equals_reference(
        lambda backend, x, gate, w: gated_rms_norm(x, gate, w, 1e-5, activation=activation, backend=backend),
        tensors(shape, shape, shape[-1:]), device)


@pytest.mark.parametrize("shape", SHAPES)
def test_l2_norm(shape, device):
    assert_equals_reference(lambda backend, x: l2_norm(x, backend=backend), tensors(shape), device)


def test_rows_of_several_programs(device):
    assert_equals_reference(lambda backend, x, w: rms_norm(x, w, 1e-6, backend=backend),
                            tensors((203, 130), (130,)), device)


def test_strided_inputs_and_gradients(device):
    def run(backend, x, gate, w):
        slices = x[..., 3:23].transpose(0, 1), gate.transpose(0, 2)
        return gated_rms_norm(*slices, w, 1e-6, backend=backend).sum((0, 1), keepdim=True).expand(5, 4, 20)

    assert_equals_reference(run, tensors((4, 6, 25), (20, 4, 6), (20,)), device)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # in rows past the end
def test_rows_of_zeros_without_eps(device):
    x, w = torch.ones(3, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    grads = torch.autograd.grad(rms_norm(x, w, 0.0, backend="triton").square().sum(), (x, w))
    assert all(torch.isfinite(grad).all() for grad in grads)
    x = torch.zeros(3, 8, device=device, requires_grad=True)
    grad = torch.autograd.grad(l2_norm(x, backend="triton").sum(), x)[0]
    assert torch.allclose(grad, torch.full_like(grad, 1e3))


def test_autocast_changes_nothing(device):
    x, w = (t.detach().to(device).requires_grad_() for t in tensors((9, 32), (32,), dtype=torch.float32))
    expected = torch.autograd.grad(rms_norm(x, w, 1e-6, backend="triton").square().sum(), (x, w))
    with torch.autocast(device, dtype=torch.bfloat16):
        grads = torch.autograd.grad(rms_norm(x, w, 1e-6, backend="triton").square().sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_rows_too_long_are_refused(device):
    with pytest.raises(KernelUnavailable, match="rows of up to 8192"):
        l2_norm(torch.zeros(1, 8193, device=device), backend="triton")
