"""2-simplicial attention: equal to the cube of scores, causal, packed, and ordinary attention without second keys."""

import pytest
import torch

from hybridlm_kernels import attention, simplicial_attention
from tests.support.kernel_compare import assert_same_function, error, tensors


def case(T=37, S=None, R=None, B=1, H=2, G=1, K=4, dtype=torch.float64):
    S, R = S or T, R or T
    return tensors((B, T, H, K), (B, S, G, K), (B, S, G, K), (B, R, G, K), (B, R, G, K), dtype=dtype)


@pytest.mark.parametrize(("T", "S", "R", "windows"), [(1, 1, 1, (5, 3)), (37, 37, 37, (9, 4)), (20, 20, 20, (3, 30)),
                                                     (5, 13, 8, (9, 4)), (1, 9, 4, (9, 4))])
def test_equals_reference(T, S, R, windows):
    inputs = case(T, S, R, B=2, H=4, G=2)
    assert_same_function(lambda backend: simplicial_attention(*inputs, window=windows[0], second_window=windows[1],
                                                              backend=backend), inputs, 1e-11)


def test_packed_equals_reference():
    inputs = case(35, B=2)
    assert_same_function(lambda backend: simplicial_attention(
        *inputs, window=9, second_window=4, scale=0.3, cu_seqlens=[0, 1, 3, 20, 20, 35, 69, 70], backend=backend),
        inputs, 1e-11)


def test_pairs_by_hand():
    q, k, v, k2, v2 = (x.detach()[0, :, 0] for x in case(6, H=1))
    o = simplicial_attention(*(x[None, :, None] for x in (q, k, v, k2, v2)), window=3, second_window=2)[0, :, 0]
    for t in range(6):
        pairs = [(s, r) for s in range(max(0, t - 2), t + 1) for r in range(max(0, t - 1), t + 1)]
        p = torch.stack([(q[t] * k[s] * k2[r]).sum() / 2 for s, r in pairs]).softmax(0)
        torch.testing.assert_close(o[t], sum(weight * v[s] * v2[r] for weight, (s, r) in zip(p, pairs, strict=True)))


def test_constant_second_keys_and_values_leave_attention():
    q, k, v, k2, _ = (x.detach() for x in case(40))
    ones = torch.ones_like(k2)
    o = simplicial_attention(q, k, v, ones, ones, window=9, second_window=4)
    torch.testing.assert_close(o, attention(q, k, v, window=9))


def test_later_tokens_change_no_bit_and_half_precision_is_near():
    inputs = [x.detach() for x in case(50, dtype=torch.float32)]
    before = simplicial_attention(*inputs, window=20, second_window=5)
    for t in (0, 15, 16):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t + 1 :] += 1.0
        after = simplicial_attention(*changed, window=20, second_window=5)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])
    half = simplicial_attention(*(x.bfloat16() for x in inputs), window=20, second_window=5)
    assert error(half, before) < 0.03
    with pytest.raises(ValueError, match=r"simplicial_attention \(second keys\): window must be at least 1; got 0"):
        simplicial_attention(*inputs, second_window=0)
