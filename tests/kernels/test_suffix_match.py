"""Longest matches: equal to the definition, by an automaton too, the gradient of flipped bits, packed, continued."""

import pytest
import torch

from hybridlm_kernels import suffix_match
from hybridlm_kernels.ops.suffix_match import automaton, reference, torch_backend
from tests.support.kernel_compare import error, tensors

BORDERS = [0, 1, 3, 9, 12, 24]


def case(T=12, bits=1, streams=3, B=2, dtype=torch.float64):
    """Queries that are often the keys, so that matches are long."""
    q, k, v, scale = tensors((B, T, bits * streams), (B, T, bits * streams), (B, T, bits * streams), (bits * streams,),
                             dtype=dtype)
    with torch.no_grad():
        q[:, T // 3 :] = k[:, : T - T // 3]
        k[:, :, 0] = 0.5  # a stream of one symbol has the longest runs
    return q, k, v, scale


@pytest.mark.parametrize("backend", ["torch", "automaton"])
@pytest.mark.parametrize(("options", "borders", "T"), [
    ({}, None, 1), ({}, None, 2), ({}, None, 12), ({}, BORDERS, 12),
    ({"bits": 2, "unmatched": "zero"}, None, 9), ({"bits": 3}, BORDERS, 12)])
def test_outputs_and_gradients_are_those_of_the_definition(backend, options, borders, T):
    inputs = case(T, options.get("bits", 1))
    results = []
    for name in (backend, "reference"):
        y, _ = suffix_match(*inputs, cu_seqlens=borders, backend=name, **options)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
        results.append([y, *torch.autograd.grad(y, inputs, upstream)])
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-12


@pytest.mark.parametrize("symbols", [1, 2, 3, 16])
def test_matches_of_long_rows_by_run_lengths_and_by_an_automaton(symbols):
    q, k = torch.randint(symbols, (2, 4, 120), generator=torch.Generator().manual_seed(symbols), dtype=torch.int32)
    k[1] = q[1]
    q[2, 40:80] = k[2, 7:47]
    k[3] = torch.arange(120) // 7 % 2
    found = torch_backend.match(q, k)
    assert torch.equal(found, automaton.match(q, k))
    sample = [(row, t) for row in range(4) for t in (0, 1, 2, 39, 79, 119)]
    assert [found[row, t].item() for row, t in sample] == [
        reference.longest_match(q[row].tolist(), k[row].tolist(), t) for row, t in sample]


def test_matches_by_hand():
    q, k = (torch.tensor([row], dtype=torch.int32) for row in ([1, 2, 3, 1, 2, 9], [1, 2, 3, 2, 5, 5]))
    # 1 has no key before it; 2: not the key 2 of its own token; 1 2 ends at key 1, which 3 follows.
    assert torch_backend.match(q, k).tolist() == [[0, 0, 0, 1, 2, 0]]


def test_the_gradient_is_the_published_difference_of_flipped_bits():
    """Sum dy y with the bit set less that with it not set, over 2 max(|x|, 0.001) (RWKV-LM, 251014_rosa_1bit_train)."""
    q, k, v, scale = case(8, B=1)
    with torch.no_grad():
        q[0, 2, 1] = 1e-5
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(4), dtype=q.dtype)
    grads = torch.autograd.grad(suffix_match(q, k, v, scale)[0], (q, k, v), dy)
    for which in range(3):
        for t in range(8):
            totals = []
            for sign in (1.0, -1.0):
                x = [tensor.detach().clone() for tensor in (q, k, v)]
                x[which][0, t] = sign
                totals.append((suffix_match(*x, scale, backend="automaton")[0] * dy).sum((0, 1)))
            size = (q, k, v)[which][0, t].abs().clamp_min(1e-3)
            torch.testing.assert_close(grads[which][0, t], (totals[0] - totals[1]) / (2 * size))


@torch.no_grad()
def test_rows_continue_from_run_lengths():
    q, k, v, scale = case(14, 2)
    whole, runs = suffix_match(q, k, v, scale, bits=2, final_runs=True)
    done, pieces, kept = 0, [], None
    for length in (1, 1, 4, 8):
        stop = done + length
        y, kept = suffix_match(q[:, done:stop], k[:, :stop], v[:, :stop] > 0, scale, bits=2, runs_BRG=kept,
                               final_runs=True)
        pieces.append(y)
        done = stop
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(kept, runs)


def test_later_tokens_change_no_bit():
    q, k, v, scale = (x.detach() for x in case(30, dtype=torch.float32))
    y = suffix_match(q, k, v, scale)[0]
    for t in (0, 7, 20):
        changed = [torch.cat([x[:, : t + 1], -x[:, t + 1 :]], 1) for x in (q, k, v)]
        after = suffix_match(*changed, scale)[0]
        assert torch.equal(after[:, : t + 1], y[:, : t + 1])
        assert not torch.equal(after, y)


def test_inputs_that_do_not_fit():
    q, k, v, scale = case()
    for inputs, options, message in [
        ((q, k[:, 1:], v, scale), {}, r"must be \[batch, time, channels\]"),
        ((q, k, v, scale), {"bits": 2}, "divide 3"),
        ((q, k, v, scale), {"unmatched": "plus"}, "'minus' or 'zero'"),
        ((q[:, 4:], k, v, scale), {}, r"run lengths must be \[2, 3, 3\]; got None"),
        ((q, k, v, scale), {"cu_seqlens": BORDERS, "final_runs": True}, "no run lengths at the end"),
    ]:
        with pytest.raises(ValueError, match=message):
            suffix_match(*inputs, **options)
