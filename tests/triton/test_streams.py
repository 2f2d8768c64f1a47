"""Reads and writes of residual streams: number of streams, widths beyond one block, inputs that lie apart."""

import pytest
import torch

from hybridlm_kernels import read_streams, write_streams
from hybridlm_kernels.ops.streams.triton_backend import TILE
from tests.support.against_reference import assert_equals_reference
from tests.support.kernel_compare import tensors

SHAPES = [(0, 4, 8), (1, 1), (2, 3, 3, 61), (2, 4, TILE // 4 + 7), (3, 16, 20)]


@pytest.mark.parametrize("shape", SHAPES)
def test_read_equals_reference(shape, device):
    assert_equals_reference(lambda backend, x, read: read_streams(x, read, backend=backend),
                            tensors(shape, shape[:-1]), device)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_write_equals_reference(shape, mixed, device):
    def run(backend, x, write, output, *carry):
        return write_streams(x, carry[0] if carry else None, write, output, backend=backend)

    carry = [(*shape[:-1], shape[-2])] if mixed else []
    assert_equals_reference(run, tensors(shape, shape[:-1], (*shape[:-2], shape[-1]), *carry), device)


def test_streams_that_begin_as_one_and_gradients_that_lie_apart(device):
    """All streams are the embedding at first, with a stride of zero; the sum of all has an expanded gradient."""
    def run(backend, embedding, read, carry, write):
        streams = embedding[:, None].expand(-1, 4, -1)
        x = read_streams(streams, read.T, backend=backend)
        return write_streams(streams, carry.mT, write, x, backend=backend).sum(-2).transpose(0, 1)

    assert_equals_reference(run, tensors((6, 10), (4, 6), (6, 4, 4), (6, 4)), device)


def test_dtypes_of_each(device):
    x = torch.randn(3, 4, 8, device=device, dtype=torch.float16, requires_grad=True)
    read, carry = (torch.randn(*size, device=device, requires_grad=True) for size in ((3, 4), (3, 4, 4)))
    output = torch.randn(3, 8, device=device, dtype=torch.float16, requires_grad=True)
    hidden = read_streams(x, read, backend="triton")
    y = write_streams(x, carry, read, output, backend="triton")
    grads = torch.autograd.grad(y.float().sum() + hidden.float().sum(), (x, read, carry, output))
    expected = [torch.float16] * 3 + [torch.float32] * 2 + [torch.float16]
    assert [t.dtype for t in (hidden, y, *grads)] == expected
