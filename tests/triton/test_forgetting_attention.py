"""The Triton kernels of forgetting attention against the fp64 reference, in fp32, in tiles of 32 tokens."""

from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import attention, forgetting_attention
from tests.kernels.test_forgetting_attention import case
from tests.support.kernel_compare import LargestTensor, error

TOLERANCE = 2e-6


def results(inputs, backend, **options):
    """The output and every gradient."""
    o = forgetting_attention(*inputs, backend=backend, **options)
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(o)
    return [x.detach() for x in (o, *torch.autograd.grad(o, inputs, upstream))]


def single(inputs, device):
    return [x.detach().float().to(device).requires_grad_() for x in inputs]


def compare(inputs, device, **options):
    """Equal to the reference, which gets the numbers that fp32 holds; returns what the kernels computed."""
    inputs = single(inputs, device)
    expected = results([x.detach().cpu().double().requires_grad_() for x in inputs], "reference", **options)
    found = results(inputs, "triton", **options)
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg"), found, expected, strict=True):
        assert a.dtype == torch.float32
        if not b.any():  # one key takes all: what is left of do . v - do . o depends on the order of sums
            assert a.abs().max() <= 1e-6, name
        else:
            assert error(a.cpu(), b) <= TOLERANCE, name
    return found


# rows, queries, keys, query heads, key heads, key dim, value dim; and the window
@pytest.mark.parametrize(("shape", "window"), [((1, 1, 1, 1, 1, 16, 16), None), ((1, 31, 31, 2, 1, 16, 16), None),
                                               ((2, 33, 33, 1, 1, 8, 24), 2), ((1, 65, 65, 1, 1, 16, 16), 20),
                                               ((1, 40, 75, 4, 2, 16, 16), None), ((1, 1, 70, 2, 1, 16, 16), 33),
                                               ((1, 33, 40, 1, 1, 130, 16), None)])
def test_equals_reference(shape, window, device):
    compare(case(*shape), device, window=window, scale=min(0.3, shape[5] ** -0.5))  # scores of one size at any width


CUTS = [0, 0, 1, 3, 36, 36, 72, 72]


def test_packed_documents_get_the_bits_that_they_get_alone(device):
    inputs = case(2, 36, 36, 2, 1, 16, 16)
    found = compare(inputs, device, cu_seqlens=CUTS)
    upstream = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for start, stop in pairwise(sorted(set(CUTS))):
        alone = [x.detach().flatten(0, 1)[None, start:stop].requires_grad_() for x in single(inputs, device)]
        o = forgetting_attention(*alone, backend="triton")
        grads = torch.autograd.grad(o, alone, upstream.flatten(0, 1)[None, start:stop].to(o))
        for a, b in zip(found, (o, *grads), strict=True):
            assert torch.equal(a.flatten(0, 1)[start:stop], b[0])


def test_packed_documents_with_a_window(device):
    compare(case(2, 36, 36, 1, 1, 16, 16), device, window=20, cu_seqlens=CUTS)


def test_weak_gates_behind_strong_ones_keep_their_bits(device):
    """fp32 holds the sum of the strong gates to 6e-5; the biases of what follows need more digits."""
    q, k, v, g = case(1, 70, 70, 1, 1, 16, 16, strength=30.0)
    assert g[:, :35].sum() < -700
    gates = g.detach().clone()
    gates[:, 35:] *= 1e-3
    compare((q, k, v, gates.requires_grad_()), device)


def test_gates_of_zero_hide_all_earlier_keys(device):
    q, k, v, g = case(1, 40, 40, 1, 1, 16, 16)
    closed = g.detach().clone()
    closed[:, [0, 11, 31, 32]] = -torch.inf
    found = compare((q, k, v, closed.requires_grad_()), device)
    assert all(x.isfinite().all() for x in found)
    with torch.no_grad():
        single_q, single_k, single_v, single_g = single((q, k, v, g), device)
        alone = forgetting_attention(single_q, single_k, single_v, torch.full_like(single_g, -torch.inf),
                                     backend="triton")
    torch.testing.assert_close(alone, single_v, rtol=1e-6, atol=0)


def test_without_forgetting_it_is_attention(device):
    q, k, v, g = case(1, 33, 33, 2, 1, 16, 16)
    found = compare((q, k, v, torch.zeros_like(g, requires_grad=True)), device)[0]
    assert error(found.cpu(), attention(q, k, v)) <= TOLERANCE


@pytest.mark.parametrize("window", [None, 20])
def test_causal_to_the_last_bit(window, device):
    inputs = [x.detach() for x in single(case(1, 66, 66, 1, 1, 16, 16), device)]
    before = forgetting_attention(*inputs, window=window, backend="triton")
    for t in (0, 30, 31, 32):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t + 1 :] -= 1.0
        after = forgetting_attention(*changed, window=window, backend="triton")
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_larger_tiles_of_half_precision(device):
    """Tiles of 128 queries, and of 16 in decoding; the reference gets the numbers that fp16 holds."""
    inputs = case(1, 140, 150, 1, 1, 16, 16)
    half = [x.detach().half().to(device).requires_grad_() for x in inputs[:3]] + single(inputs[3:], device)
    expected = results([x.detach().cpu().double().requires_grad_() for x in half], "reference")
    found = results(half, "triton")
    assert [x.dtype for x in found] == [torch.float16] * 4 + [torch.float32]
    assert all(error(a.cpu(), b) <= 2e-3 for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        q, k, v, g = half
        last = forgetting_attention(q[:, -1:], k, v, g, backend="triton")
    torch.testing.assert_close(last, found[0][:, -1:], rtol=1e-3, atol=1e-3)


def test_no_scores_are_kept_or_written(device):
    inputs = single(case(1, 66, 66, 1, 1, 8, 8), device)
    with LargestTensor() as made:  # the interpreter's copies of tensors are bytes, four per number
        results(inputs, "triton")
    assert 66 * 8 <= made.numel <= 66 * 8 * 4 < 66 * 66


def test_heads_that_no_tile_holds_are_refused(device):
    inputs = [x.detach() for x in single(case(1, 2, 2, 1, 1, 8, 257), device)]
    with pytest.raises(RuntimeError, match="holds heads of up to 256 dims; got 257"):
        forgetting_attention(*inputs, backend="triton")
