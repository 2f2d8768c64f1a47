"""The Triton kernels of linear_scan against the fp64 reference, in fp32."""

import pytest
import torch

from hybridlm_kernels import linear_scan
from tests.kernels.test_linear_scan import make, results_and_gradients
from tests.support.kernel_compare import error


def compare(tensors, device, **options):
    expected = results_and_gradients(*tensors, **options, backend="reference")
    single = [None if t is None else t.float().to(device) for t in tensors]
    for a, b in zip(results_and_gradients(*single, **options, backend="triton"), expected, strict=True):
        assert a.shape == b.shape
        assert error(a.cpu(), b) <= 1e-5


@pytest.mark.parametrize("T", [1, 64, 65])
def test_equals_the_definition(T, device):
    compare(make(B=1, T=T, C=5), device)


def test_packed_without_and_with_states(device):
    borders = [0, 1, 1, 70]
    compare(make(B=1, T=70, C=2, N=3), device, cu_seqlens=borders)
    compare([*make(B=1, T=70, C=2, N=3)[:2], None], device, cu_seqlens=borders)


def test_causal_to_the_last_bit(device):
    x, a, _ = (t.float().to(device) for t in make(B=1, T=70, C=1))
    before, _ = linear_scan(x, a, backend="triton")
    for t in (0, 66):
        changed = x.clone()
        changed[:, t + 1 :] += 1.0
        after, _ = linear_scan(changed, a, backend="triton")
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_complex_numbers_are_refused(device):
    x = torch.ones(1, 2, 1, dtype=torch.complex64, device=device)
    with pytest.raises(RuntimeError, match="complex64"):
        linear_scan(x, x, backend="triton")
