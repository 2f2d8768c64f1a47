"""Decode state: growing, sliding and counting."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.decode_state import RecurrentState, TokenCache


def test_appending_returns_all_tokens_over_many_growths():
    cache, x = TokenCache(500), torch.randn(2, 500, 3)
    done = 0
    for length in (1, 5, 64, 130, 200, 100):
        kept = cache.append(x[:, done : done + length])
        done += length
        assert torch.equal(kept, x[:, :done])
    assert cache.length == 500
    assert cache.num_bytes == x.numel() * 4


def test_a_window_keeps_what_the_next_token_can_see():
    cache, x = TokenCache(100, window=4), torch.randn(1, 30, 2)
    assert torch.equal(cache.append(x[:, :10]), x[:, :10])
    assert torch.equal(cache.append(x[:, 10:11]), x[:, 7:11])
    assert torch.equal(cache.append(x[:, 11:13]), x[:, 8:13])
    assert cache.num_bytes == 3 * 2 * 4
    alone = TokenCache(100, window=1)
    alone.append(x[:, :5])
    assert torch.equal(alone.append(x[:, 5:6]), x[:, 5:6])
    assert alone.num_bytes == 0


def test_more_tokens_than_asked_for_are_refused():
    cache = TokenCache(4)
    cache.append(torch.zeros(1, 3, 2))
    with pytest.raises(ConfigError, match="the decode state is full; got 5; expected at most 4 tokens"):
        cache.append(torch.zeros(1, 2, 2))


def test_an_empty_state_has_no_bytes():
    assert RecurrentState().num_bytes == 0
    assert TokenCache(4).num_bytes == 0


def test_the_cache_takes_no_part_in_gradients():
    x = torch.randn(1, 3, 2, requires_grad=True)
    assert not TokenCache(4).append(x).requires_grad
