"""Reads and writes of residual streams."""

import pytest
import torch

from hybridlm_kernels import read_streams, write_streams
from tests.support.kernel_compare import assert_same_function, tensors

DTYPES = [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(2, 0, 4, 8), (4, 1), (3, 5, 3, 61)])
def test_read_equals_reference(shape, dtype, tolerance):
    streams, read = tensors(shape, shape[:-1], dtype=dtype)
    assert_same_function(lambda backend: read_streams(streams, read, backend=backend), (streams, read), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("shape", [(2, 0, 4, 8), (4, 1), (3, 5, 3, 61)])
def test_write_equals_reference(shape, mixed, dtype, tolerance):
    streams, carry, write, output = tensors(shape, (*shape[:-1], shape[-2]), shape[:-1], (*shape[:-2], shape[-1]),
                                            dtype=dtype)
    inputs = (streams, *([carry] if mixed else []), write, output)
    assert_same_function(lambda backend: write_streams(streams, carry if mixed else None, write, output,
                                                       backend=backend), inputs, tolerance)


def test_sums_are_in_fp32_under_autocast():
    streams, read, carry = tensors((7, 4, 33), (7, 4), (7, 4, 4), dtype=torch.float32)
    for backend in ("torch", "reference"):
        plain = read_streams(streams, read, backend=backend), write_streams(streams, carry, read, streams[:, 0],
                                                                            backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = read_streams(streams, read, backend=backend), write_streams(streams, carry, read, streams[:, 0],
                                                                               backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


def test_streams_that_are_not_mixed_are_not_kept():
    """Their gradient needs no streams; M hidden states of every layer would be kept for nothing."""
    streams, write, output = tensors((2, 4, 8), (2, 4), (2, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        write_streams(streams, None, write, output)
    assert streams.shape not in kept


def test_bad_shapes():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"read_streams: read must be \[2, 3, 4\], as the streams are; got \[2, 3\]"):
        read_streams(x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="write_streams: output must be"):
        write_streams(x, None, torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="write_streams: carry must be"):
        write_streams(x, torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
