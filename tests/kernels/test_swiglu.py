"""SwiGLU, with and without bounds."""

import pytest
import torch

from hybridlm_kernels import SoftCaps, swiglu
from tests.support.kernel_compare import assert_same_function, tensors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6),
                                                  (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5, 61)])
def test_equals_reference(shape, limit, dtype, tolerance):
    gate, up = tensors(shape, shape, dtype=dtype)
    assert_same_function(lambda backend: swiglu(gate, up, limit=limit, backend=backend), (gate, up), tolerance)


def test_limit_bounds_gate_above_and_up_on_both_sides():
    gate, up = torch.tensor([-50.0, 50.0, 50.0]), torch.tensor([-9.0, -9.0, 9.0])
    y = swiglu(gate, up, limit=2.0)
    silu2 = 2.0 / (1.0 + torch.tensor(-2.0).exp())
    assert torch.allclose(y, torch.stack([torch.tensor(0.0), -2.0 * silu2, 2.0 * silu2]), atol=1e-6)


@pytest.mark.parametrize("caps", [SoftCaps(4.0, 25.0), SoftCaps(0.7, None)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 2e-2)])
def test_soft_caps_equal_reference(caps, dtype, tolerance):
    gate, up = tensors((3, 5, 61), (3, 5, 61), dtype=dtype)
    assert_same_function(lambda backend: swiglu(gate, up, soft_caps=caps, backend=backend), (gate, up), tolerance)


def test_soft_caps_bound_both_factors_and_change_little_near_zero():
    far = swiglu(torch.tensor([1e4, -1e4]), torch.tensor([1e4, 1e4]), soft_caps=SoftCaps(4.0, 25.0))
    torch.testing.assert_close(far, torch.tensor([100.0, 0.0]))
    gate, up = torch.linspace(-0.1, 0.1, 9), torch.linspace(0.1, -0.1, 9)
    torch.testing.assert_close(swiglu(gate, up, soft_caps=SoftCaps(4.0, 25.0)), swiglu(gate, up), rtol=1e-3, atol=0)


def test_halves_of_one_projection():
    (h,) = tensors((6, 22))
    assert_same_function(lambda backend: swiglu(*h.chunk(2, -1), backend=backend), (h,), 1e-13)


def test_bad_arguments():
    with pytest.raises(ValueError, match="differ"):
        swiglu(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="limit"):
        swiglu(torch.zeros(2), torch.zeros(2), limit=0.0)
    with pytest.raises(ValueError, match="limit and soft_caps cannot stand together"):
        swiglu(torch.zeros(2), torch.zeros(2), limit=1.0, soft_caps=SoftCaps(1.0, None))
    with pytest.raises(ValueError, match=r"soft caps must be positive; got 4\.0 and 0\.0"):
        SoftCaps(4.0, 0.0)
