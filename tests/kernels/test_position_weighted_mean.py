"""Position-weighted means: equal to the formula with all weights, packed, decoded, causal, stable."""

import pytest
import torch

from hybridlm_kernels import position_weighted_mean
from tests.support.kernel_compare import assert_same_function, tensors


def case(S=37, B=2, C=3, P=40, dtype=torch.float64):
    return tensors((B, S, C), (B, S, C), (P, 2), (P, 2), dtype=dtype)


@pytest.mark.parametrize(("S", "queries", "window", "borders"), [
    (1, None, None, None), (37, None, None, None), (37, None, 9, None), (37, 1, 9, None), (37, 20, None, None),
    (35, None, 4, [0, 1, 3, 20, 20, 35, 69, 70])])
def test_equals_reference(S, queries, window, borders):
    inputs = case(S)
    assert_same_function(lambda backend: position_weighted_mean(
        *inputs, window=window, queries=queries, cu_seqlens=borders, backend=backend), inputs, 1e-11)


def test_pairs_by_hand():
    k, v, left, right = (x.detach() for x in case(5, B=1))
    y = position_weighted_mean(k, v, left, right, window=2)[0]
    for t in range(5):
        w = torch.stack([left[t] @ right[s] if t - s < 2 else torch.zeros((), dtype=k.dtype) for s in range(t + 1)])
        weights = (k[0, : t + 1] + w[:, None]).exp()
        torch.testing.assert_close(y[t], (weights * v[0, : t + 1]).sum(0) / weights.sum(0))


def test_later_tokens_change_no_bit_and_large_keys_stay_finite():
    k, v, left, right = (x.detach() for x in case(40, dtype=torch.float32))
    before = position_weighted_mean(k * 200, v, left, right)
    assert before.isfinite().all()
    exact = position_weighted_mean(*(x.double() for x in (k * 200, v, left, right)), backend="reference")
    torch.testing.assert_close(before.double(), exact, rtol=1e-3, atol=1e-3)
    for t in (0, 15, 16):
        changed = [x.clone() for x in (k * 200, v)]
        for x in changed:
            x[:, t + 1 :] += 100.0
        after = position_weighted_mean(*changed, left, right)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_half_precision_is_converted_once_not_for_every_block():
    k, v, left, right = case(200, P=200, dtype=torch.bfloat16)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        position_weighted_mean(k, v, left, right, backend="torch")
    assert sum(kept.values()) <= 2 * 4 * (k.numel() + v.numel() + left.numel() + right.numel())


def test_inputs_that_do_not_fit():
    k, v, left, right = case()
    for inputs, options, message in [
        ((k, v[:, 1:], left, right), {}, "k and v must be"), ((k, v, left, right[:, 1:]), {}, "left and right must be"),
        ((k, v, left[:36], right[:36]), {}, "for 36 positions; got a document of 37"),
        ((k, v, left, right), {"queries": 38}, "queries must be 1 to 37"),
        ((k, v, left, right), {"window": 0}, "window must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            position_weighted_mean(*inputs, **options)
