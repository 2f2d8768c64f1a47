"""Attention over depth: the formula, its gradients, the precision of sums, and what is kept for the backward."""

import pytest
import torch

from hybridlm_kernels import depth_attention
from hybridlm_kernels.ops.depth_attention import torch_backend
from tests.support.kernel_compare import assert_same_function, tensors

EPS = 1e-6
DTYPES = [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(2, 0, 8), (1,), (3, 5, 61)])
@pytest.mark.parametrize("sources", [1, 2, 9])
def test_equals_reference(sources, shape, dtype, tolerance):
    query, *values = tensors(shape[-1:], *[shape] * sources, dtype=dtype)
    assert_same_function(lambda backend: depth_attention(query, values, EPS, backend=backend), (query, *values),
                         tolerance)


def test_gradients(monkeypatch):
    monkeypatch.setattr(torch_backend, "CPU_PIECE_ELEMENTS", 10)  # pieces of two tokens
    query, *values = tensors((5,), (3, 5), (3, 5), (3, 5))
    assert torch.autograd.gradcheck(lambda query, *values: depth_attention(query, values, 0.1, backend="torch"),
                                    (query, *values))


def test_a_sum_over_tokens_that_lie_apart():
    query, stack = tensors((6,), (6, 4, 3, 2))
    for backend in ("torch", "reference"):
        x = depth_attention(query, stack.transpose(0, 3), EPS, backend=backend)
        expected = depth_attention(query, list(stack.transpose(0, 3).contiguous()), EPS, backend="reference")
        torch.testing.assert_close(x, expected, rtol=1e-13, atol=1e-13)


def test_fp32_under_autocast():
    query, *values = tensors((33,), (7, 33), (7, 33), dtype=torch.float32)
    for backend in ("torch", "reference"):
        plain = depth_attention(query, values, EPS, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(depth_attention(query, values, EPS, backend=backend), plain)


def test_tokens_share_no_bit():
    query, *values = (x.detach() for x in tensors((16,), (1, 40, 16), (1, 40, 16), dtype=torch.float32))
    others = [torch.cat([x[:, :9], torch.randn(1, 31, 16)], 1) for x in values]
    assert torch.equal(depth_attention(query, others, EPS)[:, :9], depth_attention(query, values, EPS)[:, :9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_a_source_is_kept(dtype):
    query, *values = tensors((64,), *[(2, 30, 64)] * 5, dtype=dtype)
    bytes_of = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: bytes_of.setdefault(x.data_ptr(), x.numel() * x.element_size()) and x, lambda x: x):
        depth_attention(query, values, EPS)
    for x in (query, *values):
        bytes_of.pop(x.data_ptr())
    assert sum(bytes_of.values()) == 2 * 60 * 5 * 4


def test_bad_arguments():
    query, value = torch.zeros(4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="needs at least one source"):
        depth_attention(query, [], EPS)
    with pytest.raises(ValueError, match=r"shape of the last one, \[2, 4\]; got \[3, 4\] at place 0"):
        depth_attention(query, [torch.zeros(3, 4), value], EPS)
    with pytest.raises(ValueError, match=r"query must be \[4\]; got \[5\]"):
        depth_attention(torch.zeros(5), [value], EPS)
