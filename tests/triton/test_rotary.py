"""Rotary embedding: all forms, every layout of x, and its gradient."""

import pytest
import torch

from hybridlm_kernels import rotary
from tests.support.against_reference import assert_equals_reference
from tests.support.kernel_compare import tensors


def angles(*shape):
    angle = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return angle.cos(), angle.sin()


def assert_turns(run, shape, tables, device):
    cos, sin = (t.to(device) for t in tables)
    assert_equals_reference(lambda backend, x: run(backend, x, cos.to(x.dtype), sin.to(x.dtype)), tensors(shape),
                            device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(60, 30), (13, 6), (13, 1), (100, 24), (64, 32)])
@pytest.mark.parametrize("rows", [(), (1,), (3,)])
def test_equals_reference(interleaved, dim, pairs, rows, device):
    assert_turns(lambda backend, x, cos, sin: rotary(x, cos, sin, interleaved=interleaved, backend=backend),
                 (3, 5, 2, dim), angles(*rows, 5, pairs), device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("length", "heads"), [(1, 1), (63, 1), (65, 3), (2, 40)])
def test_several_tiles(interleaved, length, heads, device):
    assert_turns(lambda backend, x, cos, sin: rotary(x, cos, sin, interleaved=interleaved, backend=backend),
                 (2, length, heads, 64), angles(2, length, 32), device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("first", [1, 4])
def test_slice_of_a_wider_tensor(interleaved, first, device):
    def run(backend, x, cos, sin):
        return rotary(x[..., first:], cos, sin, interleaved=interleaved, backend=backend)

    assert_turns(run, (2, 7, 3, 20), angles(7, 4), device)


def test_head_first_layout_and_expanded_gradient(device):
    def run(backend, x, cos, sin):
        return rotary(x.permute(0, 3, 1, 2), cos, sin, backend=backend).sum(1, keepdim=True).expand(2, 7, 3, 10)

    assert_turns(run, (2, 3, 10, 7), angles(7, 4), device)


def test_inputs_are_left_alone(device):
    x = torch.randn(1, 4, 2, 8, device=device)
    before = x.clone()
    cos, sin = (t.float().to(device) for t in angles(4, 4))
    y = rotary(x, cos, sin, backend="triton")
    assert torch.equal(x, before)
    assert torch.allclose(rotary(y, cos, -sin, backend="triton"), x, atol=1e-6)
