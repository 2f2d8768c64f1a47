"""Attention over selected keys: outputs, every gradient and the inverse lists of the Triton backend."""

import pytest
import torch

from hybridlm_kernels import sparse_attention
from hybridlm_kernels.ops.sparse_attention import triton_backend as backend
from hybridlm_kernels.ops.sparse_attention import triton_inverse
from hybridlm_kernels.registry import KernelUnavailable
from tests.support.kernel_compare import error, tensors


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    monkeypatch.setattr(triton_inverse, "WORK_BUFFER_BYTES", 1)
    monkeypatch.setattr(triton_inverse, "MIN_BLOCK_QUERIES", 2)


def selections(batch, queries, keys, count):
    """Distinct positions in random order with random holes; the first query has none."""
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(batch, queries, keys, generator=generator).argsort(-1)[..., :count]
    index = index.masked_fill(torch.rand(index.shape, generator=generator) < 0.3, -1)
    index[:, 0] = -1
    return index.int()


def compare(run, inputs, device, *index):
    """Triton in fp32 against the reference in fp64: the output and the gradient of every input."""
    narrow = [x.detach().float().to(device).requires_grad_() for x in inputs]
    wide = [x.detach().cpu().double().requires_grad_() for x in narrow]
    out, expected = run(*narrow, *(i.to(device) for i in index), "triton"), run(*wide, *index, "reference")
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    grads = torch.autograd.grad(out, narrow, upstream.to(out))
    expected_grads = torch.autograd.grad(expected, wide, upstream)
    assert out.dtype == torch.float32
    assert error(out.cpu(), expected) <= 1e-5
    assert all(error(a.cpu(), b) <= 1e-5 for a, b in zip(grads, expected_grads, strict=True))


# rows, queries, keys, query heads, key heads, key dim, value dim, listed
SHAPES = [(2, 3, 5, 4, 2, 8, 12, 5), (1, 3, 80, 20, 1, 24, 8, 70)]  # 70: two blocks of 64


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, device):
    batch, queries, keys, heads, groups, dim, v_dim, listed = shape
    inputs = tensors((batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim))
    compare(lambda q, k, v, index, name: sparse_attention(q, k, v, index, scale=0.4, backend=name), inputs, device,
            selections(batch, queries, keys, listed))


# values of 32 dims are where the keys are split; those of 16 are too few for halves
@pytest.mark.parametrize(("dim", "v_dim", "shared"), [(40, 32, True), (40, 24, False), (24, 16, False)])
def test_values_that_are_part_of_the_keys(dim, v_dim, shared, device):
    inputs = tensors((1, 3, 4, dim), (1, 80, 1, dim))
    compare(lambda *args: absorbed(*args, v_dim, shared), inputs, device, selections(1, 3, 80, 70))


def test_values_that_are_part_of_the_keys_in_one_part(monkeypatch, device):
    """What Blackwell runs: its tensor memory holds no halves of wide heads."""
    config = next(each for each in backend._FORWARD_ABSORBED if each.kwargs["PARTS"] == 1)
    monkeypatch.setattr(backend._forward_absorbed, "configs", [config])
    compare(lambda *args: absorbed(*args, 32, True), tensors((1, 3, 4, 40), (1, 80, 1, 40)), device,
            selections(1, 3, 80, 70))


def absorbed(q, latent, index, name, v_dim, shared):
    """Attention whose values are the first dims of the keys; `shared`: one gather serves both."""
    k = latent * 1.0
    if name == "triton":
        assert backend.values_are_keys(k, k[..., :v_dim]) == shared
    return sparse_attention(q, k, k[..., :v_dim], index, backend=name)


def test_values_without_the_gradient_of_the_keys_are_their_own(device):
    """The same memory is not the same variable: a detached view has no gradient, and one from elsewhere its own."""
    k = torch.randn(1, 9, 1, 40, device=device, requires_grad=True)
    assert backend.values_are_keys(k, k[..., :32])
    assert backend.values_are_keys(k.detach(), k.detach()[..., :32])
    assert not backend.values_are_keys(k, k.detach()[..., :32])
    assert not backend.values_are_keys(k, k.detach()[..., :32].requires_grad_())
    assert not backend.values_are_keys(k, k[..., 8:])


def test_the_same_bits_every_time(device):
    inputs = tensors((1, 4, 2, 8), (1, 4, 1, 8), (1, 4, 1, 8))
    q, k, v = (x.detach().float().to(device).requires_grad_() for x in inputs)
    index = selections(1, 4, 4, 3).to(device)
    first, second = (torch.autograd.grad(sparse_attention(q, k, v, index, backend="triton").square().sum(), (q, k, v))
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_selection_gives_zeros(device):
    q = torch.randn(1, 2, 1, 4, device=device, requires_grad=True)
    for index in (torch.full((1, 2, 3), -1, device=device), torch.zeros(1, 2, 0, dtype=torch.int32, device=device)):
        o = sparse_attention(q, q.detach(), q.detach() + 1.0, index, backend="triton")
        assert torch.equal(o, torch.zeros_like(o))
        assert not torch.autograd.grad(o.sum(), q)[0].any()


def test_inverse_lists(device):
    index = selections(1, 7, 5, 4)[0]
    lists = triton_inverse.InverseLists(index.to(device), 5)
    for s in range(5):
        expected = [q * 4 + n for q in range(7) for n in range(4) if index[q, n] == s]
        assert lists.lists_SC[s, : int(lists.counts_S[s])].tolist() == expected


def test_heads_too_wide_are_refused_with_the_reason(device):
    q = torch.zeros(1, 1, 1, 600, device=device)
    with pytest.raises(KernelUnavailable, match="keys of up to 576"):
        sparse_attention(q, q, q, torch.zeros(1, 1, 1, dtype=torch.int32, device=device), backend="triton")
