"""Attention to ranges of keys: heads that share keys, tiles that several documents cut, queries that see nothing."""

import pytest
import torch

from hybridlm_kernels import range_attention
from tests.kernels.test_range_attention import both, ranges
from tests.support.against_reference import assert_equals_reference
from tests.support.kernel_compare import tensors


@pytest.mark.parametrize("case", [(1, 1, 1, 1, ((0,),)), (1, 70, 1, 2, ((0,),)),
                                  (2, 45, 1, 1, ((0,), (7,), (9,), (30,)))])
@pytest.mark.parametrize(("heads", "groups", "dim", "value_dim"), [(2, 2, 8, 16), (3, 1, 40, 24)])
def test_equals_reference(case, heads, groups, dim, value_dim, device):
    batch, length = case[:2]
    first, count, entries = ranges(*case)

    def run(backend, q, k, v):
        return both(range_attention(q, k, v, first.to(device), count.to(device), scale=0.3, backend=backend))

    assert_equals_reference(run, tensors((batch, length, heads, dim), (batch, entries, groups, dim),
                                         (batch, entries, groups, value_dim)), device)


def test_later_tokens_change_no_bit(device):
    first, count, entries = (x.to(device) if isinstance(x, torch.Tensor) else x for x in ranges(1, 70, 2, 4))
    q, k, v = (x.detach().float().to(device) for x in tensors((1, 70, 2, 16), (1, entries, 1, 16), (1, entries, 1, 16)))
    whole = range_attention(q, k, v, first, count, backend="triton")
    seen = int(count[0, 40])
    k[:, seen:], v[:, seen:] = 7.0, -7.0
    q[:, 41:] = 3.0
    changed = range_attention(q, k, v, first, count, backend="triton")
    assert all(torch.equal(x[:, :41], y[:, :41]) for x, y in zip(whole, changed, strict=True))
    assert not torch.equal(whole[0], changed[0])
