"""Rotary embedding: pairs, what passes unchanged, gradients."""

import pytest
import torch

from hybridlm_kernels import rotary
from tests.support.kernel_compare import assert_same_function, tensors


def angles(*shape):
    angle = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [12, 13])
@pytest.mark.parametrize("pairs", [1, 4, 6])
@pytest.mark.parametrize("rows", [(), (1,), (3,)])
def test_equals_reference(interleaved, dim, pairs, rows):
    (x,) = tensors((3, 5, 2, dim))
    cos, sin = angles(*rows, 5, pairs)
    assert_same_function(
        lambda backend: rotary(x, cos, sin, interleaved=interleaved, backend=backend), (x,), 1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("first", [1, 4])
def test_slice_of_a_wider_tensor(interleaved, first):
    (x,) = tensors((2, 7, 3, 20))
    cos, sin = angles(7, 4)
    assert_same_function(
        lambda backend: rotary(x[..., first:], cos, sin, interleaved=interleaved, backend=backend), (x,), 1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotates_each_pair_by_its_angle(interleaved):
    angle = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    pair = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., pair[1][0]], x[..., 4:] = 1.0, 7.0
    y = rotary(x, angle.cos(), angle.sin(), interleaved=interleaved)[0, 0, 0]
    expected = torch.zeros(6, dtype=torch.float64)
    expected[pair[1][0]], expected[pair[1][1]], expected[4:] = angle[0, 1].cos(), angle[0, 1].sin(), 7.0
    assert torch.allclose(y, expected)


def test_half_precision_rotates_in_fp32():
    (x,) = tensors((2, 5, 2, 8), dtype=torch.bfloat16)
    cos, sin = angles(5, 4)
    exact = rotary(x.double(), cos, sin)
    assert torch.equal(rotary(x, cos.float(), sin.float()), exact.to(torch.bfloat16))


def test_bad_shapes():
    x = torch.zeros(2, 5, 1, 8)
    for cos in (torch.zeros(4, 2), torch.zeros(3, 5, 2), torch.zeros(5, 5), torch.zeros(1, 1, 5, 2)):
        with pytest.raises(ValueError, match="rotary"):
            rotary(x, cos, cos)
    with pytest.raises(ValueError, match="sin"):
        rotary(x, torch.zeros(5, 2), torch.zeros(5, 3))
