"""Attention over depth in Triton: numbers of sources, widths, sources that lie apart, dtypes of each."""

import pytest
import torch

from hybridlm_kernels import KernelUnavailable, depth_attention
from hybridlm_kernels.ops.depth_attention import MAX_TRITON_SOURCES
from tests.support.against_reference import assert_equals_reference
from tests.support.kernel_compare import tensors


def run(backend, query, *sources):
    return depth_attention(query, sources, 1e-6, backend=backend)


@pytest.mark.parametrize(("sources", "shape"), [
    *((count, (2, 5, 20)) for count in range(1, MAX_TRITON_SOURCES + 1)), (3, (1,)), (2, (0, 8)), (3, (4, 700))])
def test_equals_reference(sources, shape, device):
    assert_equals_reference(run, tensors(shape[-1:], *[shape] * sources), device)


def test_sources_and_gradients_that_lie_apart(device):
    def transposed(backend, query, stack):
        x = depth_attention(query, stack[:, :, :, ::2].transpose(1, 2).unbind(0), 1e-6, backend=backend)
        return x.transpose(0, 1).sum(-1)

    assert_equals_reference(transposed, tensors((6,), (3, 2, 4, 12)), device)


def test_scores_that_are_far_apart(device):
    query, *sources = tensors((16,), *[(3, 16)] * 3)
    assert_equals_reference(run, (100.0 * query, *sources), device)


def test_dtypes_of_each(device):
    query = torch.randn(8, device=device, requires_grad=True)
    sources = [torch.randn(3, 8, device=device, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    x = depth_attention(query, sources, 1e-6, backend="triton")
    grads = torch.autograd.grad(x.float().sum(), (query, *sources))
    assert [t.dtype for t in (x, *grads)] == [torch.float16, torch.float32, *[torch.float16] * 3]


def test_too_many_sources_are_refused(device):
    with pytest.raises(KernelUnavailable, match="takes up to 8 sources; got 9"):
        depth_attention(torch.zeros(4, device=device), [torch.zeros(2, 4, device=device)] * 9, 1e-6, backend="triton")
