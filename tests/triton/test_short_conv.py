"""The Triton kernels of short_conv against the fp64 reference, in fp32."""

import pytest
import torch

from hybridlm_kernels import short_conv
from tests.support.kernel_compare import error


def make(B=1, T=66, C=5, W=4, N=None):
    generator = torch.Generator().manual_seed(T + W)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in
            ((B, T, C), (C, W), (C,), (N or B, C, W - 1))]


def results_and_gradients(x, weight, bias, state, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, state)]
    y, last = short_conv(*leaves[:3], initial_state=leaves[3], **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, last)]
    return [y, last, *torch.autograd.grad([y, last], [t for t in leaves if t is not None], upstream)]


def compare(tensors, device, **options):
    expected = results_and_gradients(*tensors, **options, backend="reference")
    single = [None if t is None else t.float().to(device) for t in tensors]
    for a, b in zip(results_and_gradients(*single, **options, backend="triton"), expected, strict=True):
        assert a.shape == b.shape
        assert error(a.cpu(), b) <= 1e-5


@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (29, 4), (30, 4), (31, 2), (66, 4)])
def test_equals_the_definition(T, W, device):
    """With W = 4 a document of 29 tokens and its state fill one block of 32 positions."""
    compare(make(T=T, W=W), device, activation="silu")


@pytest.mark.parametrize(("activation", "left_out"), [(None, ()), ("silu", (2,)), ("silu", (3,)), (None, (2, 3))])
def test_options(activation, left_out, device):
    compare([None if i in left_out else t for i, t in enumerate(make(B=2, T=7, W=3))], device, activation=activation)


def test_packed(device):
    compare(make(B=2, T=34, N=6), device, activation="silu", cu_seqlens=[0, 1, 3, 33, 34, 38, 68])


def test_causal_to_the_last_bit(device):
    x, weight, bias, _ = (t.float().to(device) for t in make(T=34))
    before, _ = short_conv(x, weight, bias, activation="silu", backend="triton")
    for t in (0, 28, 30):
        changed = x.clone()
        changed[:, t + 1 :] += 1.0
        after, _ = short_conv(changed, weight, bias, activation="silu", backend="triton")
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_decoding_equals_one_call(device):
    x, weight, bias, state = (t.float().to(device) for t in make(T=6))
    one_call, last = short_conv(x, weight, bias, initial_state=state, backend="triton")
    outputs = []
    for t in range(6):
        y, state = short_conv(x[:, t : t + 1], weight, bias, initial_state=state, backend="triton")
        outputs.append(y)
    assert torch.equal(torch.cat(outputs, 1), one_call)
    assert torch.equal(state, last)


def test_too_many_taps_are_refused(device):
    with pytest.raises(RuntimeError, match="2 to 8 taps; got 9"):
        short_conv(torch.zeros(1, 4, 2, device=device), torch.zeros(2, 9, device=device), backend="triton")
