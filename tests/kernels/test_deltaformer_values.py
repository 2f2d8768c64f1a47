"""DeltaFormer's values: equal to the definition, causal, packed, and continued from earlier ones."""

import pytest
import torch

from hybridlm_kernels import deltaformer_values
from tests.support.kernel_compare import assert_same_function, error, tensors


def case(T=37, B=1, H=2, G=1, K=4, dtype=torch.float64):
    return tensors((B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H), dtype=dtype)


@pytest.mark.parametrize("T", [2, 64, 65, 140])
def test_equals_reference(T):
    inputs = case(T, H=4, G=2)
    assert_same_function(lambda backend: deltaformer_values(*inputs, backend=backend), inputs, 1e-10)


def test_packed_equals_reference():
    inputs = case(70, B=2)
    assert_same_function(lambda backend: deltaformer_values(*inputs, scale=0.3, backend=backend,
                                                            cu_seqlens=[0, 1, 3, 40, 40, 70, 139, 140]), inputs, 1e-10)


def test_the_values_solve_the_triangular_system():
    """(I + diag(beta) P) u = v with P the softmax over strictly earlier tokens (eq. of the paper in matrices)."""
    q, k, v, beta = (x.detach() for x in case(9, H=1))
    score = (q[0, :, 0] @ k[0, :, 0].T / 2).masked_fill(torch.ones(9, 9).triu().bool(), -torch.inf)
    P = score.softmax(-1).nan_to_num()  # the first row has no score
    expected = torch.linalg.solve(torch.eye(9) + beta[0] * P, v[0, :, 0])
    torch.testing.assert_close(deltaformer_values(q, k, v, beta)[0, :, 0], expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_later_tokens_continue_from_earlier_values(backend):
    q, k, v, beta = (x.detach() for x in case(90))
    whole = deltaformer_values(q, k, v, beta)
    later = slice(70, None)
    u = deltaformer_values(q[:, later], k, v[:, later], beta[:, later], past_BPHV=whole[:, :70], backend=backend)
    torch.testing.assert_close(u, whole[:, later])


def test_later_tokens_change_no_bit_and_half_precision_is_near():
    inputs = [x.detach() for x in case(130, dtype=torch.float32)]
    before = deltaformer_values(*inputs)
    for t in (0, 63, 64):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, t + 1 :] *= 0.5
        after = deltaformer_values(*changed)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])
    assert error(deltaformer_values(*(x.bfloat16() for x in inputs)), before) < 0.03
    with pytest.raises(ValueError, match=r"deltaformer_values: beta must be \[1, 130, 2\]; got \[1, 130\]"):
        deltaformer_values(*inputs[:3], inputs[3][..., 0])
