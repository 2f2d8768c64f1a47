"""The Triton kernels of selective_scan against the fp64 reference, in fp32."""

import pytest
import torch

from hybridlm_kernels import selective_scan
from tests.kernels.test_selective_scan import make, results_and_gradients
from tests.support.kernel_compare import error


def compare(tensors, device, **options):
    expected = results_and_gradients(*tensors, **options, backend="reference")
    single = [None if t is None else t.float().to(device) for t in tensors]
    for a, b in zip(results_and_gradients(*single, **options, backend="triton"), expected, strict=True):
        assert a.shape == b.shape
        assert error(a.cpu(), b) <= 1e-5


@pytest.mark.parametrize(("T", "longhorn"), [(1, False), (17, False), (17, True)])
def test_equals_the_definition(T, longhorn, device):
    compare(make(rows=1, T=T, D=3, N=3, longhorn=longhorn), device)


@pytest.mark.parametrize("longhorn", [False, True])
def test_packed_without_and_with_states(longhorn, device):
    borders = [0, 1, 1, 20]
    tensors = make(rows=1, T=20, D=2, N=2, documents=3, longhorn=longhorn)
    compare(tensors, device, cu_seqlens=borders)
    compare([*tensors[:5], None], device, cu_seqlens=borders)


def test_causal_to_the_last_bit(device):
    tensors = [t.float().to(device) for t in make(rows=1, T=20, D=2, N=2)[:5]]
    before, _ = selective_scan(*tensors, backend="triton")
    for t in (0, 9, 17):
        changed = [u if i == 2 else u.clone() for i, u in enumerate(tensors)]
        for i in (0, 1, 3, 4):
            changed[i][:, t + 1 :] += 1.0
        after, _ = selective_scan(*changed, backend="triton")
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_many_states_are_refused(device):
    x, B = torch.ones(1, 2, 1, device=device), torch.ones(1, 2, 65, device=device)
    with pytest.raises(RuntimeError, match="up to 64 states per channel; got 65"):
        selective_scan(x, x, torch.ones(1, 65, device=device), B, B, backend="triton")
