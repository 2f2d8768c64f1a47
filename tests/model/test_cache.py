"""Decode state: growing, sliding and counting."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.decode_state import EntryCache, RecurrentState, TokenCache
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.sequence import SequenceInfo


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


def test_entries_are_made_where_a_window_is_complete_and_windows_once_per_forward():
    x, made = torch.randn(2, 12, 3), []

    def combine(windows_BEL, place_BE):
        made.append(place_BE[0].tolist())
        return windows_BEL.mean(2)

    cache, seq = EntryCache(12, length=4, stride=2), SequenceInfo.make(2, 12, x.device)
    for t in range(12):
        entries = cache.append(x[:, t : t + 1], combine)
    windows = EntryWindows.of(seq, x, 12, 4, 2)
    assert made == [[], [0], [2], [4], [6], [8]]  # the first call says what shape entries have
    assert torch.equal(entries, windows.gather(x).mean(2)[:, :5])
    assert cache.num_bytes == 2 * (5 + 2) * 3 * 4
    padded = windows.pad(entries)
    assert torch.equal(padded, torch.cat([entries, torch.zeros(2, 1, 3)], 1))
    assert windows.pad(padded) is padded
    assert EntryWindows.of(seq, x, 12, 4, 2) is windows
    for queries, length, stride in ((3, 4, 2), (12, 2, 2), (12, 4, 4)):
        other = EntryWindows.of(seq, x[:, -queries:], 12, length, stride)
        assert (other.count_BT.shape[1], other.length, other.stride) == (queries, length, stride)
