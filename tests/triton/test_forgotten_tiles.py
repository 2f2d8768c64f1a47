"""Tiles of scores that forgetting attention leaves out: only those of which nothing is left in fp32."""

from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import forgetting_attention
from hybridlm_kernels.ops.forgetting_attention import triton_backend, triton_bounds
from hybridlm_kernels.ops.forgetting_attention.triton_gates import sum_gates
from hybridlm_kernels.ops.forgetting_attention.triton_tiles import TileSizes
from hybridlm_kernels.packing import CuSeqlens
from tests.kernels.test_forgetting_attention import case
from tests.support.kernel_compare import error
from tests.triton.test_forgetting_attention import compare, results, single

SIZES = TileSizes.of(torch.float32, 16, 16, 100)  # tiles of 32 queries and 32 keys


def first_keys(inputs, device="cpu", sizes=SIZES, scale=None, borders=None):
    """The first key that each tile of queries reads [H, P], for fp32 inputs."""
    q, k, _, g = (x.detach().float().to(device).contiguous() for x in inputs)
    high, low = sum_gates(g, q.shape[1], borders)
    return triton_bounds.find_first_keys(q, k, high, low, q.shape[3] ** -0.5 if scale is None else scale, sizes,
                                         borders)


def forgetting(*shape, nats):
    """Inputs whose gates are all exp(-nats)."""
    q, k, v, g = case(*shape)
    return q, k, v, torch.full_like(g, -nats, requires_grad=True)


def assert_same_bits(inputs, device, monkeypatch, **options):
    """The output and every gradient, with the bounds and without."""
    inputs = single(inputs, device)
    found = results(inputs, "triton", **options)
    monkeypatch.setattr(triton_backend, "find_first_keys", lambda *_: None)
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg"), found, results(inputs, "triton", **options), strict=True):
        assert torch.equal(a, b), name


def closed(inputs, *places):
    """Inputs with gates of zero at some places."""
    q, k, v, g = inputs
    g = g.detach().clone()
    g[:, list(places)] = -torch.inf
    return q, k, v, g.requires_grad_()


# rows, queries, keys, query heads, key heads, key dim, value dim
SHAPES = [(2, 200, 200, 2, 1, 16, 16), (1, 100, 230, 1, 1, 16, 8), (1, 130, 130, 1, 1, 130, 16)]


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nats", [0.0, 2.0, 5.0, 30.0])
def test_what_is_left_out_changes_no_bit(shape, nats, window, device, monkeypatch):
    inputs = forgetting(*shape, nats=nats)
    first = first_keys(inputs, device, TileSizes.of(torch.float32, *shape[5:], shape[1]))
    assert bool(first.any()) == (nats > 0)
    assert_same_bits(inputs, device, monkeypatch, window=window)


def test_wide_heads_in_half_precision(device, monkeypatch):
    """Tiles of 128 queries forward, of 64 for dq and of 32 for dk and dv."""
    q, k, v, g = (x.detach() for x in forgetting(1, 260, 260, 1, 1, 136, 8, nats=4.0))
    inputs = [x.half().to(device).requires_grad_() for x in (q, k, v)] + [g.float().to(device).requires_grad_()]
    assert first_keys(inputs, device, TileSizes.of(torch.float16, 136, 8, 260)).max() > 100
    found = results(inputs, "triton")
    monkeypatch.setattr(triton_backend, "find_first_keys", lambda *_: None)
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg"), found, results(inputs, "triton"), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("nats", [2.0, 5.0])
def test_equals_the_reference_where_most_is_left_out(nats, device):
    inputs = forgetting(1, 200, 200, 2, 1, 16, 16, nats=nats)
    read = (torch.arange(7) * 32 - first_keys(inputs, device).cpu()) // 32  # tiles before that of the diagonal
    assert read.sum() < 0.6 * 2 * sum(range(7))
    compare(inputs, device)


def test_packed_documents(device, monkeypatch):
    cuts = [0, 3, 100, 100, 196, 200, 370, 400]
    inputs = closed(forgetting(2, 200, 200, 2, 1, 16, 16, nats=3.0), 50, 120)
    first = first_keys(inputs, borders=CuSeqlens(cuts))
    place = 0
    for start, stop in pairwise(sorted(set(cuts))):  # as if each stood alone
        tiles = -(-(stop - start) // 32)
        if stop - start >= triton_bounds.MIN_QUERIES:
            alone = [x.detach().flatten(0, 1)[None, start:stop] for x in inputs]
            assert (first[:, place : place + tiles] <= first_keys(alone)).all()  # longer keys may stand elsewhere
            assert tiles < 4 or first[:, place + tiles - 1].min() > 0
        place += tiles
    assert place == first.shape[1]
    compare(inputs, device, cu_seqlens=cuts)
    assert_same_bits(inputs, device, monkeypatch, cu_seqlens=cuts)


def test_a_gate_of_zero_is_a_border(device, monkeypatch):
    inputs = closed(forgetting(1, 200, 200, 1, 1, 16, 16, nats=0.0), 0, 64, 130, 131)
    # Queries 64 to 127 need nothing before 64; of 128 to 159 the first two do, and of the last nobody before 131.
    assert first_keys(inputs).tolist() == [[0, 0, 64, 64, 64, 128, 128]]
    compare(inputs, device)
    assert_same_bits(inputs, device, monkeypatch)
    everywhere = closed(inputs, *range(200))
    assert first_keys(everywhere).tolist() == [[0, 32, 64, 96, 128, 160, 192]]
    assert_same_bits(everywhere, device, monkeypatch)


def test_a_far_key_that_outweighs_its_decay_is_read(device):
    """A key whose score is 140 nats above all others has half of the weight of a query 140 nats behind it."""
    q, k, v, g = (x.detach().clone() for x in forgetting(1, 160, 160, 1, 1, 16, 16, nats=1.0))
    k[:] = 0
    q[:, :, 0, 0], k[:, 0, 0, 0] = 20.0, 14.0
    inputs = [x.requires_grad_() for x in (q, k, v, g)]
    assert not first_keys(inputs, device, scale=0.5).any()
    found, expected = (results(x, backend, scale=0.5) for x, backend in ((single(inputs, device), "triton"),
                                                                        (inputs, "reference")))
    for a, b in zip(found, expected, strict=True):
        assert error(a.cpu(), b) <= 1.5e-5  # the distance of fp32 numbers near a score of 140


@pytest.mark.parametrize("scale", [-1.0, 0.25])
def test_only_probabilities_of_zero_are_left_out(scale, device):
    """Every tile before the first, in fp64: exp of all scores less the log of their sum is 0 in fp32. The tile that is
    first is left out where the bound has one tile's decay more to spare."""
    inputs = forgetting(1, 320, 320, 2, 2, 16, 16, nats=2.0)
    q, k, _, g = (x.detach() for x in inputs)
    first = first_keys(inputs, device, scale=scale).cpu()
    F = g[0].cumsum(0).T
    score = torch.einsum("thk,shk->hts", q[0], k[0]) * scale + F[:, :, None] - F[:, None]
    p = torch.log_softmax(score.masked_fill(torch.ones(320, 320).triu(1).bool(), -torch.inf), -1)
    spare = 105 + 2 * abs(scale) * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    for h in range(2):
        for tile, begin in enumerate(first[h].tolist()):
            rows = p[h, tile * 32 : tile * 32 + 32]
            assert (rows[:, :begin].float().exp() == 0).all()
            assert tile * 32 - begin <= spare / 2.0 + 32


def test_tiles_of_keys_end_where_no_query_reads_them():
    inputs = forgetting(1, 100, 230, 2, 1, 16, 16, nats=3.0)
    first = first_keys(inputs)
    last = triton_bounds.find_last_queries(first, 1, 100, 230, SIZES, None)
    assert last.shape == (2, 8)
    for h in range(2):
        for tile in range(8):
            readers = [min(100, (i + 1) * 32) for i in range(4) if first[h, i] < (tile + 1) * 32]
            assert last[h, tile] == max(readers, default=0)
    assert (last == 0).any()


def test_in_decoding_all_keys_are_read(device):
    q, k, v, g = (x.detach().float().to(device) for x in forgetting(1, 1, 100, 1, 1, 16, 16, nats=9.0))
    assert first_keys((q, k, v, g), device) is None
    o = forgetting_attention(q, k, v, g, backend="triton")
    torch.testing.assert_close(o, forgetting_attention(q, k, v, g, backend="reference"))


@pytest.mark.parametrize(("nats", "fraction"), [(0.01, 1.0), (0.1, 0.301), (0.7, 0.076)])
def test_tiles_that_are_read_of_a_long_row(nats, fraction):
    """Of 128 queries and 64 keys, in a row of 8192 normal tokens with heads of 128; the README names these numbers."""
    assert tiles_read(nats) == pytest.approx(fraction, abs=0.002)


def tiles_read(nats, tokens=8192, dim=128):
    """The fraction of the tiles below the diagonal that the forward pass reads."""
    sizes = TileSizes.of(torch.bfloat16, dim, dim, tokens)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, 1, dim, generator=generator) for _ in range(2))
    queries, keys = sizes.forward
    first = first_keys((q, k, k, torch.full((1, tokens, 1), -nats)), sizes=sizes)
    end = (torch.arange(first.shape[1]) + 1) * queries
    return ((end - first[0]) / keys).sum().item() / (end / keys).sum().item()
