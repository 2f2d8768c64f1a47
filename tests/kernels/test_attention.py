"""Attention: every mask against the dense formula, gradients, and what a query must not see."""

from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import CuSeqlens, attention
from hybridlm_kernels.ops.attention import banded, torch_backend
from tests.support.kernel_compare import assert_same_function, error, tensors

# rows, queries, keys, query heads, key heads, key dim, value dim
SHAPES = [(1, 1, 1, 1, 1, 4, 4), (2, 37, 37, 4, 2, 8, 8), (1, 300, 300, 2, 1, 12, 8), (2, 1, 50, 4, 4, 8, 12),
          (1, 20, 50, 2, 2, 60, 60), (1, 300, 333, 2, 2, 16, 8), (2, 129, 129, 2, 2, 8, 8)]


def case(batch, queries, keys, heads, groups, dim, v_dim, dtype=torch.float64):
    return tensors((batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim), (heads,),
                   dtype=dtype)


def borders(batch, length):
    """Documents of one token, of two, and others."""
    inner = {1, 3, length // 2, batch * length - length // 3, batch * length - 1}
    return sorted({*range(0, batch * length + 1, length), *(b for b in inner if 0 < b < batch * length)})


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, window, sinks):
    q, k, v, s = case(*shape)
    inputs = (q, k, v, s) if sinks else (q, k, v)
    assert_same_function(
        lambda backend: attention(q, k, v, window=window, sinks_H=s if sinks else None, backend=backend), inputs,
        1e-12)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] == s[2]])
def test_packed_equals_reference(shape, window, sinks):
    q, k, v, s = case(*shape)
    inputs = (q, k, v, s) if sinks else (q, k, v)
    assert_same_function(
        lambda backend: attention(q, k, v, scale=0.3, window=window, sinks_H=s if sinks else None,
                                  cu_seqlens=borders(*shape[:2]), backend=backend), inputs, 1e-12)


@pytest.mark.parametrize("elements", [1, 2**21])  # a block per piece, and several rows
@pytest.mark.parametrize(("batch", "length"), [(1, 65), (3, 131)])
def test_bands_on_views_equal_bands_on_copies(monkeypatch, elements, batch, length):
    monkeypatch.setattr(banded, "CPU_PIECE_ELEMENTS", elements)
    q, k, v, _ = case(batch, length, length, 4, 2, 4, 4)
    views = banded.banded_by_views(q, k, v, 20, 0.4)
    copies = banded.banded_by_copies(q, k, v, 20, lambda q, k, v, mask: torch_backend._softmax_attention(
        q, k, v, 0.4, None, mask_QS=mask))
    assert torch.equal(views, copies)
    upstream = torch.randn_like(views)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (views, copies)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_bands_keep_no_copy_of_keys():
    q, k, v, _ = case(1, 300, 300, 4, 2, 8, 8, dtype=torch.float32)
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: storages.setdefault(x.data_ptr(), x.numel()) and x, lambda x: x):
        attention(q, k, v, window=16)
    assert sum(storages.values()) == 2 * q.numel() + 2 * k.numel() + 4 * (64 + 256)  # the last block has 32 queries


@pytest.mark.parametrize("window", [20, 70])
def test_gradients_of_bands(window):
    q, k, v, _ = case(2, 75 if window == 20 else 150, 75 if window == 20 else 150, 2, 1, 2, 2)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, window=window), (q, k, v), fast_mode=True)


def test_bands_round_as_autocast_asks():
    q, k, v, _ = (x.detach() for x in case(1, 100, 100, 2, 2, 8, 8, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention(q, k, v, window=16)
    assert torch.equal(cast, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window=16))


@pytest.mark.parametrize("window", [None, 16])
def test_packed_equals_separate_documents(window):
    q, k, v, s = case(2, 200, 200, 4, 2, 16, 16, dtype=torch.float32)
    upstream = torch.randn(2, 200, 4, 16)
    cuts = borders(2, 200)
    packed = attention(q, k, v, window=window, sinks_H=s, cu_seqlens=cuts)
    got = torch.autograd.grad(packed, (q, k, v, s), upstream)
    parts = []
    for start, stop in pairwise(cuts):
        rows = [x.flatten(0, 1)[None, start:stop] for x in (q, k, v)]
        parts.append(attention(*rows, window=window, sinks_H=s)[0])
    separate = torch.cat(parts)
    expected = torch.autograd.grad(separate, (q, k, v, s), upstream.flatten(0, 1))
    assert error(packed.flatten(0, 1), separate) < 1e-6
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-6


def test_nan_in_one_document_stays_there():
    q, k, v, _ = (t.detach() for t in case(1, 60, 60, 2, 2, 8, 8, dtype=torch.float32))
    cuts = [0, 20, 37, 60]
    clean = attention(q, k, v, cu_seqlens=cuts)
    for x in (q, k, v):
        x[:, :20] = torch.nan
    assert torch.equal(attention(q, k, v, cu_seqlens=cuts)[:, 20:], clean[:, 20:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 9, 100])
def test_later_tokens_change_no_bit(window, sinks, packed, dtype):
    batch, length = 2, 270
    q, k, v, s = (t.detach() for t in case(batch, length, length, 4, 2, 24, 16, dtype=dtype))
    options = {"window": window, "sinks_H": s if sinks else None,
               "cu_seqlens": borders(batch, length) if packed else None}
    out = attention(q, k, v, **options)
    for cut in (1, 63, 64, 100, 128, 200, length - 1):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, cut:] = torch.randn_like(x[:, cut:])
        assert torch.equal(attention(*others, **options)[:, :cut], out[:, :cut])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 30])
def test_decoding_equals_the_whole(window, sinks):
    q, k, v, s = (t.detach() for t in case(2, 90, 90, 4, 2, 16, 8, dtype=torch.float32))
    s = s if sinks else None
    whole = attention(q, k, v, window=window, sinks_H=s)
    prefill = attention(q[:, 10:50], k[:, :50], v[:, :50], window=window, sinks_H=s)
    assert torch.allclose(prefill, whole[:, 10:50], atol=1e-5)
    for t in (0, 1, 29, 30, 89):
        step = attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], window=window, sinks_H=s)
        assert torch.allclose(step, whole[:, t : t + 1], atol=1e-5)


def test_a_sink_takes_its_share():
    q, k = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)
    v = torch.ones(1, 3, 1, 2)
    o = attention(q, k, v, sinks_H=torch.tensor([2.0]))
    keys = torch.arange(1.0, 4.0)
    assert torch.allclose(o[0, :, 0, 0], keys / (keys + torch.tensor(2.0).exp()))


def test_bf16_sinks_keep_their_precision():
    q, k, v, s = case(1, 64, 64, 2, 2, 64, 64, dtype=torch.bfloat16)
    exact = attention(q.double(), k.double(), v.double(), sinks_H=s.double(), backend="reference")
    assert error(attention(q, k, v, sinks_H=s), exact) < 5e-3


def test_unwritten_memory_is_never_read():
    q, k, v, s = case(2, 150, 150, 2, 1, 12, 8, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)  # with it, torch fills new memory with NaN
    try:
        for window in (None, 20):
            o = attention(q, k, v, window=window, sinks_H=s, cu_seqlens=borders(2, 150))
            grads = torch.autograd.grad(o.square().sum(), (q, k, v, s))
            assert all(torch.isfinite(t).all() for t in (o, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


def test_borders_in_every_form():
    q, k, v, _ = case(1, 30, 30, 2, 2, 8, 8)
    cuts = [0, 7, 30]
    expected = attention(q, k, v, cu_seqlens=cuts)
    for form in (torch.tensor(cuts, dtype=torch.int32), CuSeqlens(cuts), tuple(cuts)):
        assert torch.equal(attention(q, k, v, cu_seqlens=form), expected)


def test_bad_arguments():
    q, k, v, s = case(2, 8, 8, 4, 2, 8, 8)
    for bad in ({"k_BSGK": k[:, :, :1]}, {"v_BSGV": v[:1]}, {"k_BSGK": k[..., :4]}, {"q_BTHK": q[:, :, :3]},
                {"k_BSGK": k[:, :5], "v_BSGV": v[:, :5]}, {"window": 0}, {"sinks_H": s[:2]},
                {"cu_seqlens": [0, 12, 16]}, {"cu_seqlens": [0, 8]},
                {"q_BTHK": q[:, :4], "cu_seqlens": [0, 4, 8]}):
        with pytest.raises(ValueError):
            attention(**{"q_BTHK": q, "k_BSGK": k, "v_BSGV": v, **bad})
