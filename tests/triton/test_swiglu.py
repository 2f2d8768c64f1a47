"""SwiGLU with and without bounds, contiguous and as halves of one projection."""

import pytest
import torch

from hybridlm_kernels import swiglu
from tests.support.against_reference import assert_equals_reference
from tests.support.kernel_compare import tensors


@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5, 61), (2, 2049)])
def test_equals_reference(shape, limit, device):
    assert_equals_reference(lambda backend, gate, up: swiglu(gate, up, limit=limit, backend=backend),
                            tensors(shape, shape), device)


@pytest.mark.parametrize("limit", [None, 0.7])
def test_halves_of_one_projection(limit, device):
    assert_equals_reference(lambda backend, h: swiglu(*h.chunk(2, -1), limit=limit, backend=backend),
                            tensors((7, 200)), device)


def test_transposed_inputs_and_expanded_gradient(device):
    def run(backend, gate, up):
        return swiglu(gate.T, up, backend=backend).sum(0, keepdim=True).expand(6, 5)

    assert_equals_reference(run, tensors((5, 6), (6, 5)), device)


def test_nan_stays_nan(device):
    x, ones = torch.full((3,), float("nan"), device=device), torch.ones(3, device=device)
    assert swiglu(x, ones, limit=1.0, backend="triton").isnan().all()
    assert swiglu(ones, x, limit=1.0, backend="triton").isnan().all()


def test_dtypes_of_each(device):
    gate = torch.randn(4, 8, device=device, dtype=torch.float16, requires_grad=True)
    up = torch.randn(4, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = swiglu(gate, up, backend="triton")
    grads = torch.autograd.grad(y.float().sum(), (gate, up))
    assert [t.dtype for t in (y, *grads)] == [torch.float16, torch.float16, torch.float32]
    assert torch.allclose(y.float(), swiglu(gate.float(), up, backend="reference"), atol=2e-3, rtol=2e-3)
